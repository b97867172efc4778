from typing import Any

import equinox as eqx
from diffrax import AbstractSolver

from .._checks import check_one_step_solver, check_optional_int
from .._custom_types import IntScalarLike
from .._state import DeerState
from .._window import Discretisation, Iterate
from .base import AbstractGuess, Solve
from .coarse_grid import (
    coarse_grid,
    ROUGH_MAX_ITERS,
    ROUGH_RTOL,
    unless_constant_is_better,
)


class CoarseGuess(AbstractGuess):
    """Solves one substep after the other: by default all of them, so that nothing is
    left to solve jointly.

    This is what a CPU does best, and its default. Explicit substeps are made. Implicit
    ones are iterated on, beginning with what happened in the one before. If there are
    fewer and larger ones, then this interpolates between them. Where these are unstable
    (the problem is stiff and the solver explicit), it falls back to the constant guess.
    """

    solver: AbstractSolver[Any] | None = None
    steps: int | None = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        if self.solver is not None:
            check_one_step_solver(self.solver, "CoarseGuess(solver=...)")
        check_optional_int(self.steps, "CoarseGuess(steps=...)")

    def is_sequential(self, problem: Discretisation) -> bool:
        makes_all = self.steps is None or self.steps >= problem.substeps
        return makes_all and self.solver in (None, problem.solver)

    def __call__(
        self, problem: Discretisation, previous: DeerState | None, solve: Solve
    ) -> tuple[Iterate, IntScalarLike]:
        del previous
        if self.is_sequential(problem):
            # As the guess of another one.
            solution = solve(problem, None, ROUGH_RTOL, ROUGH_MAX_ITERS)
            return solution.at, solution.span
        steps = problem.substeps if self.steps is None else self.steps
        ts = coarse_grid(problem.ts, min(steps, problem.substeps))
        coarse = problem.on(ts, self.solver)
        solution = solve(coarse, None, ROUGH_RTOL, ROUGH_MAX_ITERS)
        ys = coarse.evaluate(solution.at, problem.t1s)
        guess = unless_constant_is_better(problem, problem.ravel_all(ys))
        return guess, solution.span + 1


CoarseGuess.__init__.__doc__ = """**Arguments:**

- `solver`: the solver that makes these steps. Defaults to the solver that
    [`diffrax_deer.DeerSolver`][] wraps.
- `steps`: how many steps to make. (At most `substeps`.) Defaults to `substeps`.
"""
