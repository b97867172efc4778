import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, Bool, Int, Real

from .._custom_types import IntScalarLike
from .._iterate import JointSolution
from .._window import Discretisation, Iterate


Guess = Callable[[Discretisation], tuple[Iterate, IntScalarLike]]
Solve = Callable[[Discretisation, Iterate, IntScalarLike | None], JointSolution]


class Placed(eqx.Module):
    """A grid, and the solution on it.

    **Attributes:**

    - `fractions`: when its substeps begin and end, as fractions of the window. `None`
        if they are equally long.
    - `solution`: of the window.
    - `required_substeps`: how many substeps it takes to be as accurate as was asked
        for. `None` if nothing was.
    - `is_accurate`: whether it is.
    """

    fractions: Real[Array, " substeps_plus_1"] | None
    solution: JointSolution
    required_substeps: Int[Array, ""] | None
    is_accurate: Bool[Array, ""] | bool


class AbstractGrid(eqx.Module):
    """Abstract base class for all ways to divide a window into substeps."""

    @property
    @abc.abstractmethod
    def is_uniform(self) -> bool:
        """Whether all substeps of a window are equally long."""

    @abc.abstractmethod
    def init(
        self, substeps: int, dtype: Any
    ) -> tuple[Real[Array, " substeps_plus_1"] | None, Int[Array, ""] | None]:
        """What `fractions` and `required_substeps` are before the first window."""

    @abc.abstractmethod
    def place(self, problem: Discretisation, guess: Guess, solve: Solve) -> Placed:
        """Finds the grid and the solution, none of which is differentiated here.

        **Arguments:**

        - `problem`: the differential equation and the wrapped solver, on the grid to
            begin with: substeps of equal length, or those of the same window before.
        - `guess`: a function `problem -> guess, span`, for the first of all.
        - `solve`: a function `(problem, guess, max_iters) -> solution`. If `max_iters`
            is `None` then there are as many iterations as the user allows.
        """
