from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractLocalInterpolation
from jaxtyping import Array, PyTree, Real

from .._step import OneStepMap


def coarse_grid(
    ts: Real[Array, " substeps_plus_1"], steps: int
) -> Real[Array, " steps_plus_1"]:
    """Some of the times in `ts`, about evenly spaced, such that there are `steps` steps
    between them."""
    return ts[jnp.arange(steps + 1, dtype=jnp.int32) * _used(ts) // steps]


def _used(ts):
    # Substeps of length zero, with which a window may be padded, do not count.
    return jnp.maximum(jnp.searchsorted(ts, ts[-1]), 1)


def interpolate(
    ts: Real[Array, " substeps_plus_1"],
    coarse_ts: Real[Array, " steps_plus_1"],
    interpolation_cls: Callable[..., AbstractLocalInterpolation],
    dense_infos: PyTree[Array],
) -> PyTree[Array]:
    """The values at `ts[1:]`, given the dense output on `coarse_grid(ts, steps)`."""
    steps = coarse_ts.shape[0] - 1

    def one(n, t):
        # The large step that the `n`-th substep is a part of.
        i = jnp.minimum(-(n * steps // -_used(ts)), steps) - 1
        dense_info = jtu.tree_map(lambda x: x[i], dense_infos)
        return interpolation_cls(
            t0=coarse_ts[i], t1=coarse_ts[i + 1], **dense_info
        ).evaluate(t)

    return jax.vmap(one)(jnp.arange(1, ts.shape[0], dtype=jnp.int32), ts[1:])


def unless_constant_is_better(
    ys: PyTree[Array],
    step: OneStepMap,
    ts: Real[Array, " substeps_plus_1"],
    y0: PyTree[Array],
) -> PyTree[Array]:
    """Of a guess and the constant one, that which satisfies the differential equation
    better. If it is no ordinary differential equation, the former."""
    vector_field = step.vector_field
    if vector_field is None:
        return ys
    substeps = ts.shape[0] - 1

    def defect(ys):
        ys = jax.vmap(step.ravel, axis_size=substeps)(ys)
        ys = jnp.concatenate([step.ravel(y0)[None], ys])
        fs = jax.vmap(vector_field)(ts, ys)
        trapezoid = 0.5 * jnp.diff(ts)[:, None] * (fs[1:] + fs[:-1])
        size = jnp.max(jnp.abs(jnp.diff(ys, axis=0) - trapezoid), initial=0)
        return jnp.where(jnp.isfinite(size), size, jnp.inf)

    stack = lambda ys, y0: jnp.stack([ys, jnp.broadcast_to(y0, ys.shape)])
    stacked = jtu.tree_map(stack, ys, y0)
    index = jnp.argmin(jax.vmap(defect, axis_size=2)(stacked))
    return jtu.tree_map(lambda ys: ys[index], stacked)
