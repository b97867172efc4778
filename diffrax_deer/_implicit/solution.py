"""The derivative of the solution of a window, by the implicit function theorem."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import RESULTS
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int, PyTree

from .._custom_types import IntScalarLike
from .._iterate import Iteration, JointSolution, known_solution
from .._method import AbstractMethod
from .._scan import AbstractScan
from .._window import AbstractWindow, Iterate
from .linear import linear_solve


_T = TypeVar("_T")


class Chunks(eqx.Module):
    """How a window is cut into parts, of which only the first `used` ones are solved.
    (Those that follow are of length zero.)"""

    number: int = eqx.field(static=True)
    size: int = eqx.field(static=True)
    used: Int[Array, ""] | int

    def at(self, x: PyTree[Array], index) -> PyTree[Array]:
        return jtu.tree_map(lambda x: self._split(x)[index], x)

    def set(self, x: PyTree[Array], index, values: PyTree[Array]) -> PyTree[Array]:
        def one(x, value):
            return self._split(x).at[index].set(value).reshape(x.shape)

        return jtu.tree_map(one, x, values)

    def _split(self, x):
        return x.reshape(self.number, self.size, *x.shape[1:])

    def loop(self, body, carry, reverse=False):
        if self.number == 1:
            return body(0, carry)
        # Chunks that not all elements of a batch make use of have length zero.
        used = eqxi.unvmap_max(jnp.asarray(self.used))
        index = lambda i: used - 1 - i if reverse else i
        return lax.fori_loop(0, used, lambda i, carry: body(index(i), carry), carry)


# This could be `jax.lax.custom_root`, which however traces the derivatives also if they
# are not needed.
@eqx.filter_custom_jvp
def implicit_solution(
    at: Iterate,
    window: AbstractWindow,
    *,
    method: AbstractMethod,
    scan: AbstractScan,
    chunks: Chunks,
) -> Iterate:
    """The solution of a window, as a function of all that the window consists of. It
    must be known already.

    Its derivative solves the linearised equations, and the transpose of that goes
    backwards in time. To bound the memory needed, these work on one chunk at a time.
    """
    del window, method, scan, chunks
    return at


@implicit_solution.def_jvp
def _(primals, tangents, *, method, scan, chunks):
    at, window = primals
    _, t_window = tangents
    # For higher derivatives: the rule below also depends on the solution.
    at = implicit_solution(at, window, method=method, scan=scan, chunks=chunks)
    t_y0 = jnp.zeros_like(at.ys[0]) if t_window.y0 is None else t_window.y0
    t_window = _replace(t_window, y0=t_y0)
    linearised = _Linearised(at, window, t_window, method, scan, chunks)
    zeros = jtu.tree_map(jnp.zeros_like, at)
    # As a single vector, as if one part of the right-hand side is being differentiated
    # then JAX wants this of all of them. (Parameters may be of any precision.)
    with jax.numpy_dtype_promotion("standard"):
        b, unravel = ravel_pytree((zeros, linearised.t_moved))

    def flat(fn):
        def flat_fn(x):
            out = fn(unravel(x))
            with jax.numpy_dtype_promotion("standard"):
                return ravel_pytree(out)[0]

        return flat_fn

    # JAX traces the transpose in any case, but a vector field with a `while_loop` has
    # none. In forward mode it need not have.
    mv = flat(linearised.mv)
    try:
        jax.eval_shape(jax.linear_transpose(mv, b), b)
    except ValueError:
        transpose_solve = None
    else:
        transpose_solve = lambda _, b: flat(linearised.transpose_solve)(b)
    x = lax.custom_linear_solve(
        mv,
        b,
        solve=lambda _, b: flat(linearised.solve)(b),
        transpose_solve=transpose_solve,
    )
    return at, unravel(x)[0]


class _Linearised:
    """The linear system for the derivatives of both the unknowns and of what the window
    consists of: the latter are what they are, and the former satisfy the linearised
    equations. By stating this, JAX can differentiate and transpose without looking into
    the loops that solve it, which may thus be whatever is best.
    """

    def __init__(self, at, window, t_window, method, scan, chunks):
        self.at, self.method, self.scan, self.chunks = at, method, scan, chunks
        # Only what has a tangent takes part in the differentiation.
        is_none = lambda t: t is None
        has_tangent = jtu.tree_map(lambda t: t is not None, t_window, is_leaf=is_none)
        self.moved, self.fixed = eqx.partition(window, has_tangent)
        self.t_moved = eqx.filter(t_window, has_tangent)

    def mv(self, x):
        x_at, x_moved = x
        targets = lambda moved, at: eqx.combine(moved, self.fixed).all_targets(at)
        _, t_targets = jax.jvp(targets, (self.moved, self.at), (x_moved, x_at))
        return jtu.tree_map(jnp.subtract, x_at, t_targets), x_moved

    def solve(self, b):
        b_at, x_moved = b

        def body(index, carry):
            x_at, x_start = carry
            b_chunk = self.chunks.at(b_at, index)
            at, moved, targets = self._chunk(index)
            # What the unknowns of this chunk depend on, but for its start.
            x_chunk = self._part(x_moved, index, jnp.zeros_like(x_start))
            _, t_targets = jax.jvp(lambda m: targets(m)(at), (moved,), (x_chunk,))
            b_chunk = jtu.tree_map(jnp.add, b_chunk, t_targets)
            window = eqx.combine(moved, self._fixed(index))
            x_chunk = linear_solve(window, at, self.method, self.scan)(x_start, b_chunk)
            return self.chunks.set(x_at, index, x_chunk), x_chunk.ys[-1]

        x_at, _ = self.chunks.loop(body, (b_at, x_moved.y0))
        return x_at, x_moved

    def transpose_solve(self, b):
        b_at, x_moved = b
        zero = jnp.zeros_like(x_moved.y0)

        def body(index, carry):
            x_at, x_moved, x_end = carry
            b_chunk = self.chunks.at(b_at, index)
            b_chunk = eqx.tree_at(lambda x: x.ys, b_chunk, b_chunk.ys.at[-1].add(x_end))
            at, moved, targets = self._chunk(index)
            window = eqx.combine(moved, self._fixed(index))
            solve = linear_solve(window, at, self.method, self.scan)
            x_start, x_chunk = jax.linear_transpose(solve, zero, b_chunk)(b_chunk)
            x_at = self.chunks.set(x_at, index, x_chunk)
            # A vector field that cannot be differentiated in reverse mode will do, as
            # long as only the initial value is being differentiated.
            others = _replace(moved, y0=None)
            if len(jtu.tree_leaves(others)) > 0:
                at_start = lambda others: _replace(others, y0=moved.y0)
                _, vjp = jax.vjp(lambda o: targets(at_start(o))(at), others)
                [d_others] = vjp(x_chunk)
                x_moved = self._add(x_moved, index, d_others)
            return x_at, x_moved, x_start

        carry = (jtu.tree_map(jnp.zeros_like, b_at), x_moved, zero)
        x_at, x_moved, x_start = self.chunks.loop(body, carry, reverse=True)
        return x_at, _replace(x_moved, y0=x_moved.y0 + x_start)

    def _chunk(self, index):
        """The unknowns of a chunk, what it consists of, and its equations."""
        before = self.chunks.size * index - 1
        start = jnp.where(before < 0, self.moved.y0, self.at.ys[jnp.maximum(before, 0)])
        moved = self._part(self.moved, index, start)
        fixed = self._fixed(index)
        targets = lambda moved: eqx.combine(moved, fixed).all_targets
        return self.chunks.at(self.at, index), moved, targets

    def _part(self, window, index, start):
        return _replace(window, xs=self.chunks.at(window.xs, index), y0=start)

    def _fixed(self, index):
        return _replace(self.fixed, xs=self.chunks.at(self.fixed.xs, index))

    def _add(self, x_moved, index, d_others):
        xs = jtu.tree_map(jnp.add, self.chunks.at(x_moved.xs, index), d_others.xs)
        xs = self.chunks.set(x_moved.xs, index, xs)
        others = lambda window: _replace(window, xs=None, y0=None)
        out = jtu.tree_map(jnp.add, others(x_moved), others(d_others))
        return _replace(out, xs=xs, y0=x_moved.y0)


def _replace(window: AbstractWindow, **fields: Any) -> AbstractWindow:
    # Without `__init__`, as the window may be one of which parts are missing.
    out = object.__new__(type(window))
    for field in dataclasses.fields(window):
        value = fields.get(field.name, getattr(window, field.name))
        object.__setattr__(out, field.name, value)
    return out


def without_gradient(fn: Callable[[], _T]) -> _T:
    """`fn()`, as a constant."""
    # Hoist everything that `fn` closes over, and stop the gradient there. Otherwise JAX
    # would differentiate the operations of the iteration, or complain that it cannot.
    converted: Any = eqx.filter_closure_convert(fn)
    dynamic, static = eqx.partition(converted, eqx.is_array)
    return eqx.combine(lax.stop_gradient(dynamic), static)()


def joint_solve(
    iteration: Iteration,
    guess: Callable[[], tuple[Iterate, IntScalarLike]],
    is_solution: bool = False,
) -> JointSolution:
    """Solves a window. The guess comes with its span, and may be the solution already.

    The solution can be differentiated with respect to all that the window consists of,
    in forward and in reverse mode and more than once. Its derivative is that of the
    equations solved: it depends neither on the guess nor on the method.

    If the result is not successful, then `ys` is `window.y0` throughout.
    """
    window = iteration.window

    def find():
        first, span = guess()
        if is_solution:
            return known_solution(first, span)
        solution = iteration.run(first)
        return eqx.tree_at(lambda s: s.span, solution, solution.span + span)

    solution = without_gradient(find)
    okay = solution.result == RESULTS.successful
    # A window that failed is masked out by the step size controller, at the end. But
    # the zero cotangents that it gets are still multiplied with derivatives, which far
    # from the solution might overflow.
    ys = jnp.where(okay, solution.at.ys, window.y0[None])
    at = Iterate(ys, jnp.where(okay, solution.at.ks, 0))
    at = implicit_solution(
        at,
        window,
        method=iteration.method,
        scan=iteration.scan,
        chunks=Chunks(1, len(ys), 1),
    )
    return eqx.tree_at(lambda s: s.at, solution, at)
