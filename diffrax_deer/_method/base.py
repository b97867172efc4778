import abc

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._scan import AbstractScan, Matrices
from .._window import AbstractWindow


class AbstractMethod(eqx.Module):
    r"""Abstract base class for all ways to linearise the substeps of a window, and to
    correct the trajectory over it.

    A method decides how many iterations a window takes, and what each of them costs. It
    has no influence on the solution (up to tolerance), nor on its derivatives.
    """

    @abc.abstractmethod
    def linearise(
        self,
        window: AbstractWindow,
        ys: Float[Array, "substeps size"],
    ) -> Matrices:
        r"""Approximate the Jacobians of all substeps.

        **Arguments:**

        - `window`: the substeps, each a one-step map $\Phi_n$, and the initial value
            $y_0$.
        - `ys`: the flattened values at the ends of the substeps, as far as known.

        **Returns:**

        $A_n \approx \frac{\partial \Phi_n}{\partial y}(y_n)$ for $n = 0, \ldots, N-1$,
        either as matrices or only their diagonals. The value of $A_0$ is never used, as
        $y_0$ is known.
        """

    @abc.abstractmethod
    def correct(
        self,
        scan: AbstractScan,
        A: Matrices,
        r: Float[Array, "substeps size"],
        ys: Float[Array, "substeps size"],
    ) -> tuple[Float[Array, "substeps size"], Bool[Array, ""]]:
        r"""Find a correction of the trajectory.

        **Arguments:**

        - `scan`: evaluates linear recurrences.
        - `A`: what `linearise` has returned.
        - `r`: the residuals $\Phi_n(y_n) - y_{n+1}$.
        - `ys`: the values that these belong to.

        **Returns:**

        What to add to `ys`, and whether its size tells how far away the solution is. If
        the first $n$ residuals are zero, then so are the first $n$ corrections, and the
        one that follows equals its residual, whatever is returned for them.
        """


class AbstractUndampedMethod(AbstractMethod):
    """Corrects by as much as the linearisation says."""

    def correct(
        self,
        scan: AbstractScan,
        A: Matrices,
        r: Float[Array, "substeps size"],
        ys: Float[Array, "substeps size"],
    ) -> tuple[Float[Array, "substeps size"], Bool[Array, ""]]:
        del ys
        return scan(A, r), jnp.array(True)
