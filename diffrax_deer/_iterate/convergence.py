"""When an iteration is done."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


# The best rate of convergence that is believed.
_MIN_RATE = 1e-3
# An iteration whose corrections shrink by less than this does not get any further.
_STANDSTILL = 0.5
# The fraction of the tolerance that the estimated distance to the solution must reach.
_KAPPA = 0.1


class Convergence(eqx.Module):
    """How an iteration proceeds, and whether it is done.

    **Attributes:**

    - `change`: the size of the last correction, in units of the tolerance. Zero if
        there has been none.
    """

    change: Float[Array, ""]

    def is_exact(
        self, excess: Float[Array, "*substeps"], drift: Float[Array, "*substeps"]
    ) -> Bool[Array, "*substeps"]:
        """Whether the residual is nothing but rounding errors, so that there is nothing
        to correct.

        `excess` is how large it is in units of what rounding errors may amount to. So
        is `drift`, of its sum until then: rounding errors largely cancel, whereas small
        steps of a solution that moves slowly add up.
        """
        return (excess <= 1) & (drift <= 1)

    def rate(self, change: Float[Array, ""]) -> Float[Array, ""]:
        """The rate of convergence, after another correction. Infinite if unknown.

        Very good ones are not believed: parts of the solution that converge slowly may
        hide behind others, as long as these are further away.
        """
        return jnp.maximum(change / self.change, _MIN_RATE)

    def is_close(
        self, change: Float[Array, ""], is_telling: Bool[Array, ""]
    ) -> Bool[Array, ""]:
        """Whether the solution has been reached by another correction, if corrections
        go on shrinking at this rate. `is_telling` is false if they are damped.

        It takes two corrections to know the rate. That is well spent: if the method is
        unstable or the linearisation poor, then a single small correction does not mean
        that the solution is near. (This is the test by `kappa` of Hairer & Wanner,
        Solving Ordinary Differential Equations II, section IV.8.)
        """
        rate = self.rate(change)
        left = jnp.where(rate < _STANDSTILL, change * rate / (1 - rate), jnp.inf)
        return (left < _KAPPA) & is_telling

    def is_standstill(self, change: Float[Array, ""]) -> Bool[Array, ""]:
        """Whether another correction is of no use any more. If the residual is nothing
        but rounding errors, then that is as it should be."""
        return (self.change > 0) & (self.rate(change) >= _STANDSTILL)
