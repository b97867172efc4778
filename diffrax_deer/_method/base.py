import abc
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._linear_algebra import Matrices
from .._scan import AbstractScan
from .._window import AbstractWindow


class AbstractMethod(eqx.Module):
    r"""Abstract base class for all ways to correct the trajectory over a window.

    A method is two things: how the substeps are linearised, and how far the correction
    is damped that follows from this. It decides how many iterations a window takes, and
    what each of them costs. It has no influence on the solution (up to tolerance), nor
    on its derivatives.
    """

    @abc.abstractmethod
    def linearise(
        self, window: AbstractWindow, points: Float[Array, "substeps points size"]
    ) -> tuple[
        Float[Array, "substeps parts points size"],
        Callable[[], Matrices],
    ]:
        r"""Evaluate the function of all substeps, and on demand its Jacobians.

        **Arguments:**

        - `window`: the substeps. `window.values(points)` evaluates their function.
        - `points`: where to do so.

        **Returns:**

        The values, and a function without arguments that returns approximations to the
        Jacobians of each row of the values with respect to the same row of `points`:
        either as matrices, with two axes of length `size` at the end, or only their
        diagonals, with one, or only blocks, with the axes `(block, block, size //
        block)`, of which the last one counts the blocks. (See
        [`diffrax_deer.QuasiDEER`][].)
        """

    @abc.abstractmethod
    def correct(
        self,
        scan: AbstractScan,
        A: Matrices,
        r: Float[Array, "substeps size"],
        ys: Float[Array, "substeps size"],
    ) -> tuple[Float[Array, "substeps size"], Bool[Array, ""]]:
        r"""Find a correction of the values at the ends of the substeps.

        **Arguments:**

        - `scan`: evaluates linear recurrences.
        - `A`: the Jacobians $A_n$ of the substeps, as follow from those above.
        - `r`: the residuals $r_n$ of the substeps.
        - `ys`: the values that these belong to.

        **Returns:**

        The correction: the solution of $\delta_{n+1} = A_n \delta_n + r_n$, $\delta_0 =
        0$, or something smaller. And whether its size tells how far away the solution
        is. If the first $n$ residuals are zero, then so are the first $n$ corrections,
        and the one that follows equals its residual, whatever is returned for them. (So
        a single substep is corrected without being asked for.)
        """

    @abc.abstractmethod
    def span(self, size: int) -> int:
        """How many Jacobian-vector products follow one another in a linearisation, for
        a state of this size."""


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
