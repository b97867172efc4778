import abc
from collections.abc import Callable

import equinox as eqx

from .._custom_types import IntScalarLike, RealScalarLike
from .._iterate import JointSolution
from .._state import DeerState
from .._window import Discretisation, Iterate


Solve = Callable[
    [Discretisation, Iterate | None, RealScalarLike, IntScalarLike], JointSolution
]


class AbstractGuess(eqx.Module):
    """Abstract base class for all ways to guess the trajectory over a window.

    A guess decides how many iterations a window takes. It has no influence on the
    solution (up to tolerance), nor on its derivatives.

    !!! example

        ```python
        class Decaying(AbstractGuess):
            def __call__(self, problem, previous, solve):
                decay = jnp.exp(problem.ts[0] - problem.ts[1:])
                ys = problem.y0 * decay[:, None]
                return problem.window.interpolated(problem.ravel_all(ys)), 0
        ```
    """

    def is_sequential(self, problem: Discretisation) -> bool:
        """Whether to solve one substep after the other instead, so that there is
        nothing to guess. By default not."""
        del problem
        return False

    @abc.abstractmethod
    def __call__(
        self, problem: Discretisation, previous: DeerState | None, solve: Solve
    ) -> tuple[Iterate, IntScalarLike]:
        """Guess a trajectory.

        **Arguments:**

        - `problem`: the differential equation (`problem.terms`, `problem.args`), the
            wrapped solver (`problem.solver`), the times at which the substeps begin and
            end (`problem.ts`), and the value at the first of these (`problem.y0`).
        - `previous`: the window before this one, the times of which are NaN if there is
            none. With an `AdaptiveGrid`, `previous.fractions` are when its substeps
            begin and end. `None` if `DeerAdjoint` has merged steps.
        - `solve`: a function `(problem, guess, rtol, max_iters) -> solution`, which
            solves another problem (on a coarser grid, say) jointly, as the `DeerSolver`
            does, up to this tolerance, and in no more than so many iterations. If
            `guess` is `None`, then one substep after the other.

        **Returns:**

        First, the flattened values at the ends of the substeps, and their stages.
        `problem.ravel_all` flattens values that are like `problem.y0` with an
        additional leading axis, and `problem.window.interpolated` adds stages that lie
        in between. What is not finite is replaced by the value at the start.

        Second, how many evaluations of the vector field followed one another.
        """
