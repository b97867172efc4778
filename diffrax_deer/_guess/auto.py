import jax

from .._custom_types import IntScalarLike
from .._state import DeerState
from .._window import Discretisation, Iterate
from .base import AbstractGuess
from .coarse import CoarseGuess
from .constant import ConstantGuess
from .nested import NestedGuess


# Iterations from a constant guess are made on grids of up to this many substeps.
_LONG = 1024
_FACTOR = 4


class AutoGuess(AbstractGuess):
    """Picks a guess that suits the platform that the computation is going to run on.

    On CPUs this is [`diffrax_deer.CoarseGuess`][], that is, the solution. On everything
    else it is [`diffrax_deer.ConstantGuess`][], and over windows of more than 1024
    substeps [`diffrax_deer.NestedGuess`][], with as many grids, each coarser than the
    last by a factor of 4, as lead to at most this many. (The platform is that of
    `jax.default_backend()`. To export a computation for another one, pass the guess
    explicitly.)
    """

    def __call__(
        self, problem: Discretisation, previous: DeerState | None
    ) -> tuple[Iterate, IntScalarLike]:
        return _pick(problem)(problem, previous)

    def is_solution(self, problem: Discretisation) -> bool:
        return _pick(problem).is_solution(problem)


AutoGuess.__init__.__doc__ = """**Arguments:** None"""


def _pick(problem: Discretisation) -> AbstractGuess:
    if jax.default_backend() == "cpu" and problem.sharding is None:
        return CoarseGuess()
    levels, substeps = 0, problem.substeps
    while substeps > _LONG:
        levels, substeps = levels + 1, substeps // _FACTOR
    return ConstantGuess() if levels == 0 else NestedGuess(levels, _FACTOR)
