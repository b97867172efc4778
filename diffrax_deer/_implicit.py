from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree, Shaped

from ._batch import one_by_one_on_cpus
from ._noise import is_noisy, noise_of_linear
from ._scan import AbstractScan, Matrices
from ._window import AbstractWindow, has_linear_ode


_T = TypeVar("_T")

# Of states of this size, a few products with Jacobians take less time than all of their
# columns. (Smaller ones have little to gain, and more to lose where it takes many.)
_LARGE = 16


def _with_tangents(x, t_x):
    """What of `x` has a tangent, what has none, and the tangents."""
    is_none = lambda t: t is None
    has_tangent = jtu.tree_map(lambda t: t is not None, t_x, is_leaf=is_none)
    return *eqx.partition(x, has_tangent), eqx.filter(t_x, has_tangent)


def without_gradient(fn: Callable[[], _T], *, is_loop: bool = False) -> _T:
    """`is_loop` says whether some elements of a batch may take longer than others."""
    # Hoist everything that `fn` closes over, and stop the gradient there. Otherwise JAX
    # would differentiate the operations of the iteration, or complain that it cannot.
    converted: Any = eqx.filter_closure_convert(fn)
    dynamic, static = eqx.partition(converted, eqx.is_array)
    call = lambda dynamic: eqx.combine(dynamic, static)()
    dynamic = lax.stop_gradient(dynamic)
    # Elements that know of each other, by a collective operation over a named axis, can
    # only be made together.
    if is_loop and len(converted.jaxpr.effects) == 0:
        return one_by_one_on_cpus(call, dynamic)
    else:
        return call(dynamic)


def is_preconditioner(A: Any, window: AbstractWindow) -> bool:
    """Whether derivatives should be found from products with Jacobians only, given this
    approximation to them."""
    # They are too large to be formed at all.
    if A.ndim == 2:
        return True
    # A few products take less than all columns of all stages, and than solving as many
    # recurrences, which however is the larger part where these are solved in parallel.
    is_large = A.shape[-1] >= _LARGE
    return is_large and has_linear_ode(window) and jax.default_backend() == "cpu"


# This could be `jax.lax.custom_root`, which however traces the derivatives also if they
# are not needed.
@eqx.filter_custom_jvp
def implicit_trajectory(
    ys: Float[Array, "substeps size"],
    infos: PyTree[Float[Array, "substeps ..."]],
    step: Callable,
    xs: PyTree[Shaped[Array, "substeps ..."]],
    y0: Float[Array, " size"],
    *,
    scan: AbstractScan,
    preconditioner: Matrices | None,
    chunk_size: int,
    num_chunks: Int[Array, ""] | int,
) -> tuple[Float[Array, "substeps size"], PyTree[Float[Array, "substeps ..."]]]:
    """The trajectory that satisfies `step(xs[n], ys[n - 1]) = ys[n], infos[n]` for all
    `n`, as a function of `y0`, `xs`, and all that `step` closes over, which it must
    contain as a PyTree. The trajectory itself must be known already.

    By the implicit function theorem the derivative is a linear recurrence, and its
    transpose another one, backwards in time. To bound the memory needed, these work on
    `chunk_size` substeps at a time. Only the first `num_chunks` chunks are in use.

    Without a `preconditioner`, the Jacobians of the substeps are formed. With one, that
    is with approximations to them, or to their diagonals, only products with them are.
    """
    del step, xs, y0, scan, preconditioner, chunk_size, num_chunks
    return ys, infos


@implicit_trajectory.def_jvp
def _(primals, tangents, *, scan, preconditioner, chunk_size, num_chunks):
    ys, infos, step, xs, y0 = primals
    _, _, t_step, t_xs, t_y0 = tangents
    # For higher derivatives: the rule below also depends on the solution.
    ys, infos = implicit_trajectory(
        *(ys, infos, step, xs, y0),
        scan=scan,
        preconditioner=preconditioner,
        chunk_size=chunk_size,
        num_chunks=num_chunks,
    )
    starts = jnp.concatenate([y0[None], ys[:-1]])
    substeps, size = ys.shape
    max_chunks = substeps // chunk_size
    assert substeps == max_chunks * chunk_size

    # Only what has a tangent takes part in the differentiation.
    params, fixed, t_params = _with_tangents(step, t_step)
    moved_xs, fixed_xs, t_xs = _with_tangents(xs, t_xs)

    def at(x, index):
        return jtu.tree_map(
            lambda x: x.reshape(max_chunks, chunk_size, *x.shape[1:])[index], x
        )

    def set_at(x, index, values):
        def one(x, value):
            chunks = x.reshape(max_chunks, chunk_size, *x.shape[1:])
            return chunks.at[index].set(value).reshape(x.shape)

        return jtu.tree_map(one, x, values)

    def loop(body, carry, reverse=False):
        if max_chunks == 1:
            return body(0, carry)
        # Chunks that not all elements of a batch make use of have length zero.
        num = eqxi.unvmap_max(jnp.asarray(num_chunks))
        index = lambda i: num - 1 - i if reverse else i
        return lax.fori_loop(0, num, lambda i, carry: body(index(i), carry), carry)

    def substeps_of(index):
        """All substeps of a chunk, or if that is `None` all there are, as a function,
        and where to linearise it.
        """
        pick = (lambda x: x) if index is None else (lambda x: at(x, index))
        fixed_inputs = pick(fixed_xs)

        def fn(params, inputs, starts):
            inputs = eqx.combine(inputs, fixed_inputs)
            return jax.vmap(eqx.combine(params, fixed))(inputs, starts)

        return fn, (params, pick(moved_xs), pick(starts))

    def jacobians(index, ct_infos):
        # Exact, by moving all substeps along the same unit vectors. Those of `infos`
        # are only needed as a product with some vector.
        fn, (params, inputs, starts) = substeps_of(index)
        _, jvp = jax.linearize(lambda starts: fn(params, inputs, starts), starts)

        def column(unit):
            A, info = jvp(jnp.broadcast_to(unit, starts.shape))
            products = jtu.tree_map(
                lambda x, y: jnp.sum(x * y, axis=range(1, x.ndim)), info, ct_infos
            )
            return A, sum(jtu.tree_leaves(products), jnp.zeros(chunk_size, ys.dtype))

        return jax.vmap(column, out_axes=-1)(jnp.eye(size, dtype=ys.dtype))

    def recurrence(index, b):
        """Solves `x[n + 1] = A[n] x[n] + b[n]`."""
        if preconditioner is None:
            A, _ = jacobians(index, at(infos, index))
            return scan(A, b)
        fn, (params, inputs, starts) = substeps_of(index)
        _, jvp = jax.linearize(lambda starts: fn(params, inputs, starts)[0], starts)
        shift = lambda x: jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])
        D = at(preconditioner, index)
        return _iterative(lambda x: jvp(shift(x)), lambda r: scan(D, r), b)

    def transpose_recurrence(index, b, ct_infos):
        """Solves `x[n] = A[n + 1]^T x[n + 1] + b[n]`, where to `b` is added what comes
        from `infos`. Also returns what would be `x[-1]`, at the start of the chunk.
        """
        # What happens at the start of a substep happens at the end of the last one.
        shift = lambda x: jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])
        if preconditioner is None:
            A, from_infos = jacobians(index, ct_infos)
            A_T = jnp.swapaxes(A, -1, -2)
            x = scan(shift(A_T), b + shift(from_infos), reverse=True)
            return x, jnp.sum(A_T[0] * x[0], axis=-1) + from_infos[0]
        fn, (params, inputs, starts) = substeps_of(index)
        _, vjp = jax.vjp(lambda starts: fn(params, inputs, starts), starts)
        product = lambda x, ct_infos: vjp((x, ct_infos))[0]
        b = b + shift(product(jnp.zeros_like(b), ct_infos))
        no_infos = jtu.tree_map(jnp.zeros_like, ct_infos)
        D = at(preconditioner, index)
        D = shift(D if D.ndim == b.ndim else jnp.swapaxes(D, -1, -2))
        x = _iterative(
            lambda x: shift(product(x, no_infos)),
            lambda r: scan(D, r, reverse=True),
            b,
        )
        return x, product(x, ct_infos)[0]

    # The derivative is the solution of a linear system, in both the trajectory and its
    # inputs: the inputs are what they are, and the trajectory satisfies the linearised
    # recurrence. By stating this, JAX can differentiate and transpose without looking
    # into the loops that solve it, which may thus be whatever is best.

    def matvec(x):
        x_ys, x_infos, *x_inputs, x_y0 = x
        fn, primals = substeps_of(None)
        x_starts = jnp.concatenate([x_y0[None], x_ys[:-1]])
        _, (x_ends, x_info) = jax.jvp(fn, primals, (*x_inputs, x_starts))
        x_infos = jtu.tree_map(jnp.subtract, x_infos, x_info)
        return x_ys - x_ends, x_infos, *x_inputs, x_y0

    def solve(b):
        x_ys, x_infos, x_params, x_xs, x_y0 = b

        def body(index, carry):
            x_ys, x_infos, x_start = carry
            fn, primals = substeps_of(index)
            x_inputs = (x_params, at(x_xs, index))
            # The value at the start of the chunk is just another input.
            x_starts = jnp.zeros((chunk_size, size), ys.dtype).at[0].set(x_start)
            _, (b, _) = jax.jvp(fn, primals, (*x_inputs, x_starts))
            x_chunk = recurrence(index, b + at(x_ys, index))
            x_ys = set_at(x_ys, index, x_chunk)
            x_starts = jnp.concatenate([x_start[None], x_chunk[:-1]])
            _, (_, x_info) = jax.jvp(fn, primals, (*x_inputs, x_starts))
            x_info = jtu.tree_map(jnp.add, at(x_infos, index), x_info)
            return x_ys, set_at(x_infos, index, x_info), x_chunk[-1]

        x_ys, x_infos, _ = loop(body, (x_ys, x_infos, x_y0))
        return x_ys, x_infos, x_params, x_xs, x_y0

    def transpose_solve(b):
        x_ys, x_infos, x_params, x_xs, x_y0 = b

        def body(index, carry):
            x_ys, x_params, x_xs, x_end = carry
            x_info = at(x_infos, index)
            b = at(x_ys, index).at[-1].add(x_end)
            x_chunk, x_start = transpose_recurrence(index, b, x_info)
            x_ys = set_at(x_ys, index, x_chunk)
            # A vector field that cannot be differentiated in reverse mode will do, as
            # long as only the initial value is being differentiated.
            if len(jtu.tree_leaves((x_params, x_xs))) > 0:
                fn, (params, inputs, starts) = substeps_of(index)
                _, vjp = jax.vjp(lambda p, x: fn(p, x, starts), params, inputs)
                d_params, d_xs = vjp((x_chunk, x_info))
                x_params = jtu.tree_map(jnp.add, x_params, d_params)
                d_xs = jtu.tree_map(jnp.add, at(x_xs, index), d_xs)
                x_xs = set_at(x_xs, index, d_xs)
            return x_ys, x_params, x_xs, x_start

        carry = (x_ys, x_params, x_xs, jnp.zeros_like(x_y0))
        x_ys, x_params, x_xs, x_start = loop(body, carry, reverse=True)
        return x_ys, x_infos, x_params, x_xs, x_y0 + x_start

    zeros = jtu.tree_map(jnp.zeros_like, (ys, infos))
    t_y0 = jnp.zeros_like(y0) if t_y0 is None else t_y0
    # As a single vector, as if one part of the right-hand side is being differentiated
    # then JAX wants this of all of them. (Parameters may be of any precision.)
    with jax.numpy_dtype_promotion("standard"):
        b, unravel = ravel_pytree((*zeros, t_params, t_xs, t_y0))

    def flat(fn):
        def flat_fn(x):
            out = fn(unravel(x))
            with jax.numpy_dtype_promotion("standard"):
                return ravel_pytree(out)[0]

        return flat_fn

    # JAX traces the transpose in any case, but a vector field with a `while_loop` has
    # none. In forward mode it need not have.
    try:
        jax.eval_shape(jax.linear_transpose(flat(matvec), b), b)
    except ValueError:
        transpose = None
    else:
        transpose = lambda _, b: flat(transpose_solve)(b)

    x = lax.custom_linear_solve(
        flat(matvec),
        b,
        solve=lambda _, b: flat(solve)(b),
        transpose_solve=transpose,
    )
    t_ys, t_infos, *_ = unravel(x)
    return (ys, infos), (t_ys, t_infos)


# A residual below this many rounding errors cannot be told from zero.
_ROUNDING = 16


def _iterative(product, solve, b):
    """Solves `x = product(x) + b`, if that is a recurrence that `solve` solves roughly.

    Every iteration makes one more term of it exact, to the last bit, so that there are
    at most as many of them as terms. Usually there are few.
    """
    eps = float(jnp.finfo(b.dtype).eps)
    size_of = lambda x: jnp.max(jnp.abs(x), axis=-1, keepdims=True)

    def cond_fun(carry):
        _, _, is_done, num_iterations = carry
        return jnp.invert(is_done) & (num_iterations < len(b))

    def body_fun(carry):
        x, last_size, _, num_iterations = carry
        A_x = product(x)
        new_x = A_x + b
        r = jnp.where(jnp.isfinite(new_x), new_x - x, 0)
        size = jnp.max(jnp.abs(r))
        error = _ROUNDING * eps * (size_of(x) + size_of(A_x) + size_of(b))
        if is_noisy(eps):
            is_standstill = size > 0.5 * last_size
            error = error + noise_of_linear(product, x, A_x, is_standstill)
        is_done = jnp.all(jnp.abs(new_x - x) <= error)
        new_x = new_x + (solve(r) - r)
        # Beyond the terms that are known already, this may go anywhere.
        new_x = jnp.where(jnp.isfinite(new_x), new_x, x)
        return new_x, size, is_done, num_iterations + 1

    infinite, zero = jnp.array(jnp.inf, b.dtype), jnp.array(0, jnp.int32)
    init = (b, infinite, jnp.array(False), zero)
    x, *_ = lax.while_loop(cond_fun, body_fun, init)
    return x
