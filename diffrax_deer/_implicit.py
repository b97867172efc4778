from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

from ._scan import AbstractScan


_T = TypeVar("_T")


def without_gradient(fn: Callable[[], _T]) -> _T:
    # Hoist everything that `fn` closes over, and stop the gradient there. Otherwise JAX
    # would differentiate the operations of the iteration, or complain that it cannot.
    fn = eqx.filter_closure_convert(fn)
    dynamic, static = eqx.partition(fn, eqx.is_array)
    return eqx.combine(lax.stop_gradient(dynamic), static)()


# This could be `jax.lax.custom_root`, which however traces the derivatives also if they
# are not needed.
@eqx.filter_custom_jvp
def implicit_trajectory(
    ys: Float[Array, "substeps size"],
    step: Callable,
    t0s: Real[Array, " substeps"],
    t1s: Real[Array, " substeps"],
    y0: Float[Array, " size"],
    *,
    scan: AbstractScan,
    chunk_size: int,
    num_chunks: Int[Array, ""] | int,
) -> Float[Array, "substeps size"]:
    r"""The `ys` at which $y_{n+1} = \Phi_n(y_n)$ for all $n$, which must be known
    already, as a function of $y_0$, of $\Phi_n = $ `step(t0s[n], t1s[n], ·)`, and of
    all that `step` closes over, which it must contain as a PyTree.

    The derivatives are those of the implicit function theorem: linear recurrences. To
    bound the memory needed, they are evaluated for `chunk_size` substeps at a time, up
    to `num_chunks` times, after which they are zero.
    """
    del step, t0s, t1s, y0, scan, chunk_size, num_chunks
    return ys


@implicit_trajectory.def_jvp
def _(primals, tangents, *, scan, chunk_size, num_chunks):
    ys, step, t0s, t1s, y0 = primals
    _, t_step, t_t0s, t_t1s, t_y0 = tangents
    # For higher derivatives: the rule below also depends on the solution.
    ys = implicit_trajectory(
        *(ys, step, t0s, t1s, y0),
        scan=scan,
        chunk_size=chunk_size,
        num_chunks=num_chunks,
    )
    starts = jnp.concatenate([y0[None], ys[:-1]])
    t_y0 = jnp.zeros_like(y0) if t_y0 is None else t_y0

    def chunk(t_y0, starts, times, t_times):
        return _tangents(step, t_step, times, t_times, starts, t_y0, scan)

    substeps, size = ys.shape
    if substeps == chunk_size:
        return ys, chunk(t_y0, starts, (t0s, t1s), (t_t0s, t_t1s))

    assert substeps % chunk_size == 0
    max_chunks = substeps // chunk_size
    xs = (starts, (t0s, t1s), (t_t0s, t_t1s))
    xs = jax.tree.map(lambda x: x.reshape(max_chunks, chunk_size, *x.shape[1:]), xs)

    def body_fun(carry):
        i, t_y0, t_ys = carry
        t_chunk = chunk(t_y0, *jax.tree.map(lambda x: x[i], xs))
        return i + 1, t_chunk[-1], t_ys.at[i].set(t_chunk)

    # `num_chunks` are used, of those for which there is memory.
    _, _, t_ys = eqxi.while_loop(
        lambda carry: carry[0] < num_chunks,
        body_fun,
        (0, t_y0, jnp.zeros((max_chunks, chunk_size, size), ys.dtype)),
        max_steps=max_chunks,
        buffers=lambda carry: carry[2],
        kind="bounded",
    )
    return ys, t_ys.reshape(substeps, size)


def _tangents(step, t_step, times, t_times, starts, t_y0, scan):
    def ends(step, times):
        return jax.vmap(step)(*times, starts)

    _, b = eqx.filter_jvp(ends, (step, times), (t_step, t_times))
    b = jnp.zeros_like(starts) if b is None else b

    # The exact Jacobians of all substeps, by moving them along the same unit vectors.
    _, jvp = jax.linearize(lambda starts: jax.vmap(step)(*times, starts), starts)

    def column(unit):
        return jvp(jnp.broadcast_to(unit, starts.shape))

    A = jax.vmap(column, out_axes=-1)(jnp.eye(starts.shape[-1], dtype=starts.dtype))
    b = b.at[0].add(jnp.sum(A[0] * t_y0, axis=-1))
    A_T = jnp.swapaxes(A, -1, -2)
    A_T = jnp.concatenate([A_T[1:], jnp.zeros_like(A_T[:1])])

    def matvec(x):
        previous = jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])
        return x - jnp.sum(A * previous[:, None, :], axis=-1)

    # Not just `scan(A, b)`, as thus every derivative of this, too, is a recurrence,
    # rather than the derivative of whatever operations the scan is made of.
    return lax.custom_linear_solve(
        matvec,
        b,
        solve=lambda _, b: scan(A, b),
        transpose_solve=lambda _, b: scan(A_T, b, reverse=True),
    )
