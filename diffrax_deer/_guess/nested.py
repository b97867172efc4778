import dataclasses
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import optimistix as optx
from diffrax import AbstractSolver, AbstractTerm, RESULTS
from jaxtyping import Array, PyTree, Real

from .._checks import check_instance, check_one_step_solver, check_positive_int
from .._joint import Iteration
from .._method import AbstractMethod, DEER
from .._scan import AbstractScan, AutoScan
from .._state import DeerState
from .._step import OneStepMap
from .._window import Window
from ._coarse_grid import coarse_grid, from_coarse_grid
from .base import AbstractGuess
from .coarse import CoarseGuess


# Of the solution on a coarser grid. Its discretisation error is larger.
_RTOL = 1e-3
# Where more iterations would be needed, one might as well make the steps one after the
# other. On a GPU an iteration takes as long as a few dozen of them.
_MIN_ITERS = 16
_STEPS_PER_ITER = 256


class NestedGuess(AbstractGuess):
    """Solves the window on a coarser grid first, in parallel as well, and interpolates.

    For that in turn a guess is needed, which may be the solution on a grid that is
    coarser still. As in a multigrid method, most iterations are then made where they
    cost least. It suits long windows on devices on which the steps of
    [`diffrax_deer.CoarseGuess`][], made one after the other, would be slow. Where the
    iteration does not converge soon (much coarser grids may tell nothing about the
    solution, as if it is chaotic), they are made one after the other nevertheless.
    """

    levels: int = eqx.field(default=1, static=True)
    factor: int = eqx.field(default=4, static=True)
    guess: AbstractGuess = CoarseGuess()
    solver: AbstractSolver | None = None
    method: AbstractMethod = DEER()
    scan: AbstractScan = AutoScan()
    max_iters: int | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        check_positive_int(self.levels, "NestedGuess(levels=...)")
        check_positive_int(self.factor, "NestedGuess(factor=...)")
        check_instance(self.guess, AbstractGuess, "NestedGuess(guess=...)")
        if self.solver is not None:
            check_one_step_solver(self.solver, "NestedGuess(solver=...)")
        check_instance(self.method, AbstractMethod, "NestedGuess(method=...)")
        check_instance(self.scan, AbstractScan, "NestedGuess(scan=...)")
        if self.max_iters is not None:
            check_positive_int(self.max_iters, "NestedGuess(max_iters=...)")

    def __call__(
        self,
        solver: AbstractSolver,
        terms: PyTree[AbstractTerm],
        ts: Real[Array, " substeps_plus_1"],
        y0: PyTree[Array],
        args: PyTree[Any],
        previous: DeerState | None,
    ) -> PyTree[Array]:
        steps = (ts.shape[0] - 1) // self.factor
        if steps <= 1:
            return self.guess(solver, terms, ts, y0, args, previous)
        if self.levels == 1:
            guess = self.guess
        else:
            guess = dataclasses.replace(self, levels=self.levels - 1)
        coarse_ts = coarse_grid(ts, steps)
        coarse_solver = solver if self.solver is None else self.solver
        step = OneStepMap(coarse_solver, terms, y0, args)
        window = Window(step=step, ts=coarse_ts, y0=step.ravel(y0))
        ys = guess(coarse_solver, terms, coarse_ts, y0, args, None)
        if self.max_iters is None:
            max_iters = max(_MIN_ITERS, steps // _STEPS_PER_ITER)
        else:
            max_iters = self.max_iters
        iteration = Iteration(
            window=window,
            method=self.method,
            scan=self.scan,
            rtol=_RTOL,
            atol=None,
            norm=optx.max_norm,
            max_iters=min(max_iters, steps),
            # If large steps blow up then there may be no solution to be found, and
            # steps made one after the other find that out soon. Unless there are very
            # many.
            patience=steps // (4 * _STEPS_PER_ITER),
        )
        solution = iteration.run(window.finite(window.ravel_all(ys)))
        ys = _unless_converged(window, solution)
        return from_coarse_grid(step, ts, window.y0, coarse_ts, ys)


def _unless_converged(window, solution):
    """Makes the steps one after the other, as long as they do not blow up."""
    steps = len(solution.ys)

    def goes_on(carry):
        n, y, _ = carry
        return (n < steps) & jnp.all(jnp.isfinite(y))

    def body(carry):
        n, y, ys = carry
        y = window.step(window.ts[n], window.ts[n + 1], y)
        return n + 1, y, ys.at[n].set(y)

    # No `cond`, of which a batch would always make this branch as well.
    okay = solution.result == RESULTS.successful
    first = jnp.where(okay, steps, 0).astype(jnp.int32)
    _, _, ys = lax.while_loop(goes_on, body, (first, window.y0, solution.ys))
    return ys


NestedGuess.__init__.__doc__ = """**Arguments:**

- `levels`: how many coarser grids there are. A positive integer.
- `factor`: by how much each of them is coarser than the last. A positive integer.
- `guess`: the guess on the coarsest grid.
- `solver`: the solver that makes the steps on coarser grids. Defaults to the solver
    that [`diffrax_deer.DeerSolver`][] wraps.
- `method`, `scan`: as for [`diffrax_deer.DeerSolver`][].
- `max_iters`: the maximum number of iterations on each coarser grid. If more would be
    needed, then the steps on it are made one after the other. A positive integer.
    Defaults to one for every 256 of these steps, but at least 16.
"""
