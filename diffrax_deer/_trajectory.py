from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractLocalInterpolation
from jaxtyping import Array, Float, Int, PyTree, Real

from ._custom_types import IntScalarLike
from ._step import OneStepMap


class Trajectory(eqx.Module):
    """The solution on the grid of all substeps, and its interpolation in between.

    Of the `substeps` for which there is memory the first `num_substeps` are used. Those
    that follow have length zero.
    """

    step: OneStepMap
    interpolation_cls: Callable[..., AbstractLocalInterpolation]
    t0s: Real[Array, " substeps"]
    t1s: Real[Array, " substeps"]
    # The value at `t0s[0]`, and those at all `t1s`.
    y0: Float[Array, " size"]
    ys: Float[Array, "substeps size"]
    # What the wrapped solver needs to interpolate, for each of the substeps. `None` if
    # this is only needed for a few of them.
    dense_infos: PyTree[Array] | None
    num_substeps: Int[Array, ""]

    @property
    def starts(self) -> Float[Array, "substeps size"]:
        return jnp.concatenate([self.y0[None], self.ys[:-1]])

    @property
    def t1(self) -> Real[Array, ""]:
        last = jnp.maximum(self.num_substeps - 1, 0)
        return jnp.where(self.num_substeps == 0, self.t0s[0], self.t1s[last])

    @property
    def y1(self) -> PyTree[Array]:
        last = jnp.maximum(self.num_substeps - 1, 0)
        y1 = jnp.where(self.num_substeps == 0, self.y0, self.ys[last])
        return self.step.unravel(y1)

    def interpolation(self, index: IntScalarLike) -> AbstractLocalInterpolation:
        """The interpolation over one substep."""
        t0, t1 = self.t0s[index], self.t1s[index]
        y0 = jnp.where(index == 0, self.y0, self.ys[jnp.maximum(index - 1, 0)])
        dense_info = self.step.substep(t0, t1, self.step.unravel(y0)).dense_info
        t1 = _not_zero_length(t0, t1)
        return self.interpolation_cls(t0=t0, t1=t1, **dense_info)

    def evaluate(self, ts: Real[Array, " times"]) -> PyTree[Array]:
        """The solution at many times at once. They must lie in `[t0s[0], t1]`."""
        index = jnp.searchsorted(lax.stop_gradient(self.t1s), ts)
        index = jnp.clip(index, 0, jnp.maximum(self.num_substeps - 1, 0))
        if self.dense_infos is None:
            infos = self.step.substeps(
                self.t0s[index], self.t1s[index], self.starts[index]
            ).dense_info
        else:
            infos = jtu.tree_map(lambda x: x[index], self.dense_infos)

        def evaluate(t, t0, t1, info):
            t1 = _not_zero_length(t0, t1)
            return self.interpolation_cls(t0=t0, t1=t1, **info).evaluate(t)

        return jax.vmap(evaluate)(ts, self.t0s[index], self.t1s[index], infos)


def _not_zero_length(t0, t1):
    # There may be no substeps at all, and interpolations divide by their length.
    return jnp.where(t0 == t1, t0 + 1, t1)
