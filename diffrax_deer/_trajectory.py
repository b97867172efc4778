import equinox as eqx
import jax.numpy as jnp
from diffrax import AbstractLocalInterpolation
from jaxtyping import Array, Int, PyTree, Real

from ._custom_types import IntScalarLike
from ._window import Discretisation, Iterate


class Trajectory(eqx.Module):
    """The solution on the grid of all substeps, and its interpolation in between.

    Of the substeps for which there is memory the first `num_substeps` are used. Those
    that follow have length zero.
    """

    problem: Discretisation
    at: Iterate
    num_substeps: Int[Array, ""]

    @property
    def t0(self) -> Real[Array, ""]:
        return self.problem.t0s[0]

    @property
    def t1(self) -> Real[Array, ""]:
        last = jnp.maximum(self.num_substeps - 1, 0)
        return jnp.where(self.num_substeps == 0, self.t0, self.problem.t1s[last])

    @property
    def y1(self) -> PyTree[Array]:
        last = jnp.maximum(self.num_substeps - 1, 0)
        y0 = self.problem.window.y0
        y1 = jnp.where(self.num_substeps == 0, y0, self.at.ys[last])
        return self.problem.unravel(y1)

    def interpolation(self, index: IntScalarLike) -> AbstractLocalInterpolation:
        """The interpolation over one substep."""
        return self.problem.interpolation(self.at, index)

    def evaluate(self, ts: Real[Array, " times"]) -> PyTree[Array]:
        """The solution at many times at once. They must lie in `[t0, t1]`."""
        return self.problem.evaluate(self.at, ts, self.num_substeps)
