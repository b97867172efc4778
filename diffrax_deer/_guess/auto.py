import jax

from .._custom_types import IntScalarLike
from .._state import DeerState
from .._window import Discretisation, Iterate
from .base import AbstractGuess, Solve
from .coarse import CoarseGuess
from .constant import ConstantGuess
from .nested import NestedGuess


# Up to so many entries of Jacobians, or so many substeps, a GPU takes about as long for
# an iteration as for one on a coarser grid. Then it is best to make all of them on the
# grid itself: from a constant guess they are about as many as on all grids together.
_SMALL = 2**20
_SHORT = 1024
# With 16 some coarse grids no longer tell anything about the solution, with 4 there are
# more grids, each of which has to be compiled.
_FACTOR = 8


class AutoGuess(AbstractGuess):
    """Picks a guess that suits the platform that the computation is going to run on.

    On CPUs this is [`diffrax_deer.CoarseGuess`][]: one substep is solved after the
    other. On everything else it is [`diffrax_deer.ConstantGuess`][], and over long
    windows [`diffrax_deer.NestedGuess`][], with as many grids, each coarser than the
    last by a factor of 8, as it takes until they are no longer long. Long are those of
    more than 1024 substeps whose Jacobians, of all stages, have more than a million
    entries: with `Tsit5` more than 37,449 substeps of a state of size 2, or 2,340 of
    size 8. (The platform is that of `jax.default_backend()`. To export a computation
    for another one, pass the guess explicitly.)
    """

    def __call__(
        self, problem: Discretisation, previous: DeerState | None, solve: Solve
    ) -> tuple[Iterate, IntScalarLike]:
        return _pick(problem)(problem, previous, solve)

    def is_sequential(self, problem: Discretisation) -> bool:
        return _pick(problem).is_sequential(problem)


AutoGuess.__init__.__doc__ = """**Arguments:** None"""


def _pick(problem: Discretisation) -> AbstractGuess:
    if jax.default_backend() == "cpu" and problem.sharding is None:
        return CoarseGuess()
    parts, stages = problem.window.stage_shape
    entries = max(parts * stages, 1) * problem.window.y0.size**2
    most = max(_SMALL // max(entries, 1), _SHORT)
    levels, substeps = 0, problem.substeps
    while substeps > most:
        levels, substeps = levels + 1, substeps // _FACTOR
    return ConstantGuess() if levels == 0 else NestedGuess(levels, _FACTOR)
