from typing import Any

import equinox as eqx
from diffrax import AbstractSolver

from .._checks import check_one_step_solver, check_optional_int
from .._custom_types import IntScalarLike
from .._state import DeerState
from .._window import Discretisation, Iterate
from .base import AbstractGuess, Solve
from .coarse_grid import coarse_grid, unless_constant_is_better


class CoarseGuess(AbstractGuess):
    """Makes steps one after the other: by default all of them, so that nothing is left
    to iterate on.

    This is what a CPU does best, and its default. If there are fewer and larger ones,
    then this interpolates between them. Where these are unstable (the problem is stiff
    and the solver explicit), it falls back to the constant guess.
    """

    solver: AbstractSolver[Any] | None = None
    steps: int | None = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        if self.solver is not None:
            check_one_step_solver(self.solver, "CoarseGuess(solver=...)")
        check_optional_int(self.steps, "CoarseGuess(steps=...)")

    def is_solution(self, problem: Discretisation) -> bool:
        # An implicit solver has solved its equations only roughly.
        return self._is_wrapped_solver(problem) and problem.window.is_explicit

    def _is_wrapped_solver(self, problem):
        makes_all = self.steps is None or self.steps >= problem.substeps
        return makes_all and self.solver in (None, problem.solver)

    def __call__(
        self, problem: Discretisation, previous: DeerState | None, solve: Solve
    ) -> tuple[Iterate, IntScalarLike]:
        del previous, solve
        if self._is_wrapped_solver(problem):
            return problem.sequential(), problem.sequential_span
        steps = problem.substeps if self.steps is None else self.steps
        ts = coarse_grid(problem.ts, min(steps, problem.substeps))
        coarse = problem.on(ts, self.solver)
        ys = coarse.evaluate(coarse.sequential(), problem.t1s)
        guess = unless_constant_is_better(problem, problem.ravel_all(ys))
        return guess, coarse.sequential_span + 1


CoarseGuess.__init__.__doc__ = """**Arguments:**

- `solver`: the solver that makes these steps. Defaults to the solver that
    [`diffrax_deer.DeerSolver`][] wraps.
- `steps`: how many steps to make. (At most `substeps`.) Defaults to `substeps`.
"""
