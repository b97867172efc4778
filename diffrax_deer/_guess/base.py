import abc
from typing import Any

import equinox as eqx
from diffrax import AbstractSolver, AbstractTerm
from jaxtyping import Array, PyTree, Real

from .._state import DeerState


class AbstractGuess(eqx.Module):
    """Abstract base class for all first guesses of the trajectory over a window.

    A guess decides how many iterations a window takes. Neither the solution (up to
    tolerance) nor its derivatives depend on it.
    """

    @abc.abstractmethod
    def __call__(
        self,
        solver: AbstractSolver,
        terms: PyTree[AbstractTerm],
        ts: Real[Array, " substeps_plus_1"],
        y0: PyTree[Array],
        args: PyTree[Any],
        previous: DeerState | None,
    ) -> PyTree[Array]:
        """Guess the values at the ends of all substeps.

        **Arguments:**

        - `solver`: the solver that [`diffrax_deer.DeerSolver`][] wraps.
        - `terms`, `args`: as in `diffrax.diffeqsolve`.
        - `ts`: the times at which the substeps begin and end.
        - `y0`: the value at `ts[0]`.
        - `previous`: the window before this one, the times of which are NaN if there is
            none. `None` if the substeps of windows are not of equal length, that is, if
            `DeerAdjoint` has merged steps.

        **Returns:**

        The values at `ts[1:]`: a PyTree like `y0` with a leading axis on every leaf.
        Values that are not finite are replaced by `y0`.
        """
