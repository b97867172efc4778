import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Real

from .._step import OneStepMap


def coarse_grid(
    ts: Real[Array, " substeps_plus_1"], steps: int
) -> Real[Array, " steps_plus_1"]:
    """Some of the times in `ts`, about evenly spaced, such that there are `steps` steps
    between them."""
    short, num_long = _lengths(ts, steps)
    index = jnp.arange(steps + 1, dtype=jnp.int32)
    return ts[index * short + jnp.minimum(index, num_long)]


def _lengths(ts, steps):
    # All large steps consist of as many substeps, but the first ones of one more. (To
    # round a multiple of `substeps / steps` instead would overflow on long windows.)
    # Substeps of length zero, with which a window may be padded, do not count.
    used = jnp.maximum(jnp.searchsorted(ts, ts[-1]), 1).astype(jnp.int32)
    return used // steps, used % steps


def _large_step(ts, steps):
    """Of every substep the large one that it is a part of."""
    short, num_long = _lengths(ts, steps)
    index = jnp.arange(ts.shape[0] - 1, dtype=jnp.int32)
    in_long = index // (short + 1)
    in_short = num_long + (index - num_long * (short + 1)) // jnp.maximum(short, 1)
    large = jnp.where(in_long < num_long, in_long, in_short)
    return jnp.minimum(large, steps - 1)


def from_coarse_grid(
    step: OneStepMap,
    ts: Real[Array, " substeps_plus_1"],
    y0: Float[Array, " size"],
    coarse_ts: Real[Array, " steps_plus_1"],
    coarse_ys: Float[Array, "steps size"],
) -> PyTree[Array]:
    """The guess that follows from the values at `coarse_grid(ts, steps)[1:]`."""
    coarse_ys = jnp.concatenate([y0[None], coarse_ys])
    ys = _interpolate(step, ts, coarse_ts, coarse_ys)
    return unless_constant_is_better(ys, step, ts, y0)


def _interpolate(step, ts, coarse_ts, coarse_ys):
    index = _large_step(ts, coarse_ts.shape[0] - 1)
    t0, dt = coarse_ts[index], jnp.diff(coarse_ts)[index]
    fraction = jnp.where(dt == 0, 1, (ts[1:] - t0) / jnp.where(dt == 0, 1, dt))
    x, dt = (x.astype(coarse_ys.dtype)[:, None] for x in (fraction, dt))
    y0, y1 = coarse_ys[index], coarse_ys[index + 1]
    linear = y0 + x * (y1 - y0)
    if step.vector_field is None:
        return linear
    # By cubic polynomials with the right slopes. This takes less time to compile than
    # the dense output of the solver, and is as good a guess.
    fs = jax.vmap(step.vector_field)(coarse_ts, coarse_ys)
    f0, f1 = dt * fs[index], dt * fs[index + 1]
    slope = y1 - y0
    return linear + x * (1 - x) * ((1 - x) * (f0 - slope) - x * (f1 - slope))


def unless_constant_is_better(
    ys: Float[Array, "substeps size"],
    step: OneStepMap,
    ts: Real[Array, " substeps_plus_1"],
    y0: Float[Array, " size"],
) -> PyTree[Array]:
    """Of a guess and the constant one, that which satisfies the differential equation
    better. If it is no ordinary differential equation, the former."""
    vector_field = step.vector_field
    if vector_field is None:
        return jax.vmap(step.unravel)(ys)

    def defect(ys):
        ys = jnp.concatenate([y0[None], ys])
        fs = jax.vmap(vector_field)(ts, ys)
        trapezoid = 0.5 * jnp.diff(ts)[:, None] * (fs[1:] + fs[:-1])
        size = jnp.max(jnp.abs(jnp.diff(ys, axis=0) - trapezoid), initial=0)
        return jnp.where(jnp.isfinite(size), size, jnp.inf)

    both = jnp.stack([ys, jnp.broadcast_to(y0, ys.shape)])
    return jax.vmap(step.unravel)(both[jnp.argmin(jax.vmap(defect)(both))])
