from typing import Any

import equinox as eqx
import jax.lax as lax
from diffrax import AbstractSolver, AbstractTerm
from jaxtyping import Array, PyTree, Real

from .._checks import check_one_step_solver, check_positive_int
from .._state import DeerState
from .._step import OneStepMap
from ._coarse_grid import coarse_grid, from_coarse_grid
from .base import AbstractGuess


class CoarseGuess(AbstractGuess):
    """Makes fewer and larger steps one after the other, and interpolates between them.

    Then few iterations are needed also over windows that are long enough for the
    solution to oscillate, or to pass several time scales. Where such large steps are
    unstable (the problem is stiff and the solver explicit), this falls back to the
    constant guess.
    """

    solver: AbstractSolver | None = None
    steps: int | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        if self.solver is not None:
            check_one_step_solver(self.solver, "CoarseGuess(solver=...)")
        if self.steps is not None:
            check_positive_int(self.steps, "CoarseGuess(steps=...)")

    def __call__(
        self,
        solver: AbstractSolver,
        terms: PyTree[AbstractTerm],
        ts: Real[Array, " substeps_plus_1"],
        y0: PyTree[Array],
        args: PyTree[Any],
        previous: DeerState | None,
    ) -> PyTree[Array]:
        del previous
        substeps = ts.shape[0] - 1
        if self.steps is None:
            # Measured, see `benchmarks/NOTES.md`.
            steps = max(substeps // 4, 1)
        else:
            steps = min(self.steps, substeps)
        coarse_ts = coarse_grid(ts, steps)
        coarse_solver = solver if self.solver is None else self.solver
        step = OneStepMap(coarse_solver, terms, y0, args)
        y0 = step.ravel(y0)

        def body(y, t0__t1):
            t0, t1 = t0__t1
            y = step(t0, t1, y)
            return y, y

        _, ys = lax.scan(body, y0, (coarse_ts[:-1], coarse_ts[1:]))
        return from_coarse_grid(step, ts, y0, coarse_ts, ys)


CoarseGuess.__init__.__doc__ = """**Arguments:**

- `solver`: the solver that makes these steps. Defaults to the solver that
    [`diffrax_deer.DeerSolver`][] wraps.
- `steps`: how many steps to make. (At most `substeps`.) Defaults to a quarter of
    `substeps`.
"""
