from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractPath, AbstractTerm, Solution

from .._checks import check_instance, check_trajectory
from .._custom_types import IntScalarLike
from .._state import DeerState
from .._window import Discretisation, Iterate
from .base import AbstractGuess, Solve


class SolutionGuess(AbstractGuess):
    """Guesses that the solution is an earlier one, or any other path.

    For example that of the same differential equation with slightly different
    parameters. Unlike a warm start with `diffeqsolve(..., solver_state=...)`, this
    serves whatever the windows are.

    !!! example

        ```python
        saveat = SaveAt(ts=ts, dense=True)
        sol = diffeqsolve(..., DeerSolver(), saveat=saveat)
        solver = DeerSolver(guess=SolutionGuess(sol))
        sol = diffeqsolve(..., solver, saveat=saveat)
        ```
    """

    solution: AbstractPath[Any]

    def __check_init__(self) -> None:
        check_instance(self.solution, AbstractPath, "SolutionGuess(solution=...)")
        if isinstance(self.solution, Solution) and self.solution.interpolation is None:
            raise ValueError(
                "`SolutionGuess(solution=...)` has to be interpolated. Obtain it with "
                "`diffeqsolve(..., saveat=SaveAt(dense=True))`."
            )

    def __call__(
        self, problem: Discretisation, previous: DeerState | None, solve: Solve
    ) -> tuple[Iterate, IntScalarLike]:
        del previous, solve
        path = self.solution
        times = problem.t1s * _direction(problem.terms)
        # Where there is nothing, a constant is better than an extrapolation.
        low, high = jnp.minimum(path.t0, path.t1), jnp.maximum(path.t0, path.t1)
        ys = jax.vmap(path.evaluate)(jnp.clip(times, low, high))
        if jtu.tree_structure(ys) == jtu.tree_structure(problem.y0):
            ys = jtu.tree_map(lambda y, y0: y.astype(y0.dtype), ys, problem.y0)
        message = (
            "`SolutionGuess(solution=...)` must have values like those of the "
            "differential equation."
        )
        check_trajectory(ys, problem.y0, problem.substeps, message)
        return problem.window.interpolated(problem.ravel_all(ys)), 0


SolutionGuess.__init__.__doc__ = """**Arguments:**

- `solution`: a `diffrax.Solution` that was obtained with `SaveAt(dense=True)`, or any
    other `diffrax.AbstractPath` whose values are like the state of the differential
    equation. For example `diffrax.LinearInterpolation(ts, ys)`. Before its beginning
    and after its end it is continued as a constant.
"""


def _direction(terms):
    # Backwards in time, Diffrax negates it for the sake of everything but the user.
    for term in jtu.tree_leaves(terms, is_leaf=lambda x: isinstance(x, AbstractTerm)):
        if hasattr(term, "direction"):
            return term.direction
    return 1
