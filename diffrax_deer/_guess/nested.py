import dataclasses
from typing import Any

import equinox as eqx
from diffrax import AbstractSolver

from .._checks import (
    check_instance,
    check_one_step_solver,
    check_optional_int,
    check_positive_int,
)
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
from .constant import ConstantGuess


class NestedGuess(AbstractGuess):
    """Solves the window on a coarser grid first, and interpolates.

    For that in turn a guess is needed, which may be the solution on a grid that is
    coarser still. As in a multigrid method, most iterations are then made where they
    cost least. It suits long windows. Where a coarser grid tells nothing about the
    solution (as it may, if this is chaotic, or the solver unstable), this falls back to
    the constant guess.
    """

    levels: int = eqx.field(default=1, static=True)
    factor: int = eqx.field(default=4, static=True)
    guess: AbstractGuess = ConstantGuess()
    solver: AbstractSolver[Any] | None = None
    max_iters: int | None = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        check_positive_int(self.levels, "NestedGuess(levels=...)")
        check_positive_int(self.factor, "NestedGuess(factor=...)")
        check_instance(self.guess, AbstractGuess, "NestedGuess(guess=...)")
        if self.solver is not None:
            check_one_step_solver(self.solver, "NestedGuess(solver=...)")
        check_optional_int(self.max_iters, "NestedGuess(max_iters=...)")

    def __call__(
        self, problem: Discretisation, previous: DeerState | None, solve: Solve
    ) -> tuple[Iterate, IntScalarLike]:
        steps = problem.substeps // self.factor
        is_even = steps * self.factor == problem.substeps
        if steps <= 1:
            return self.guess(problem, previous, solve)
        if self.levels == 1:
            guess = self.guess
        else:
            guess = dataclasses.replace(self, levels=self.levels - 1)
        if is_even:
            coarse = problem.merged(self.factor, self.solver)
        else:
            coarse = problem.on(coarse_grid(problem.ts, steps), self.solver)
        max_iters = ROUGH_MAX_ITERS if self.max_iters is None else self.max_iters
        first, span = guess(coarse, None, solve)
        # Also if this is not successful: the comparison below decides.
        solution = solve(coarse, coarse.window.finite(first), ROUGH_RTOL, max_iters)
        if is_even:
            t1s = problem.t1s.reshape(steps, self.factor)
            ys = coarse.evaluate_within(coarse.whole(solution.at), t1s)
        else:
            ys = coarse.evaluate(solution.at, problem.t1s)
        ys = problem.ravel_all(ys)
        # Of the last comparison, too.
        span = span + solution.span + 1
        return unless_constant_is_better(problem, ys), span


NestedGuess.__init__.__doc__ = """**Arguments:**

- `levels`: how many coarser grids there are. A positive integer.
- `factor`: by how much each of them is coarser than the last. A positive integer.
- `guess`: the guess on the coarsest grid.
- `solver`: the solver that makes the steps on coarser grids. Defaults to the solver
    that [`diffrax_deer.DeerSolver`][] wraps.
- `max_iters`: the maximum number of iterations on each coarser grid. A positive
    integer. Defaults to 64.
"""
