import abc

import equinox as eqx
from jaxtyping import Array, Float

from .._step import Window


class AbstractMethod(eqx.Module):
    r"""Abstract base class for all ways to linearise the substeps of a window.

    A method decides how many iterations a window takes, and what each of them costs. It
    has no influence on the solution (up to tolerance), nor on its derivatives.
    """

    @abc.abstractmethod
    def linearise(
        self,
        window: Window,
        ys: Float[Array, "substeps size"],
    ) -> Float[Array, "substeps size size"]:
        r"""Approximate the Jacobians of all substeps.

        **Arguments:**

        - `window`: the substeps, each a one-step map $\Phi_n$, and the initial value
            $y_0$.
        - `ys`: the flattened values at the ends of the substeps, as far as known.

        **Returns:**

        $A_n \approx \frac{\partial \Phi_n}{\partial y}(y_n)$ for $n = 0, \ldots, N-1$.
        The value of $A_0$ is never used, as $y_0$ is known.
        """
