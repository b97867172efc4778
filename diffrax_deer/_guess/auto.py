from typing import Any

import jax
import jax.lax as lax
from diffrax import AbstractSolver, AbstractTerm
from jaxtyping import Array, PyTree, Real

from .._state import DeerState
from .base import AbstractGuess
from .coarse import CoarseGuess
from .nested import NestedGuess


# On a GPU, make no more steps than a quarter of this one after the other.
_MAX_COARSEST = 128
_FACTOR = 4


class AutoGuess(AbstractGuess):
    """Picks a guess that suits the platform that the computation is going to run on.

    On CPUs this is [`diffrax_deer.CoarseGuess`][]. On everything else it is
    [`diffrax_deer.NestedGuess`][], with as many grids, each coarser than the last by a
    factor of 4, as lead from the number of substeps to at most 128; and
    [`diffrax_deer.CoarseGuess`][] on the coarsest of them. (To export a computation for
    another platform, from where JAX has nothing but CPUs, pass the latter explicitly.)
    """

    def __call__(
        self,
        solver: AbstractSolver,
        terms: PyTree[AbstractTerm],
        ts: Real[Array, " substeps_plus_1"],
        y0: PyTree[Array],
        args: PyTree[Any],
        previous: DeerState | None,
    ) -> PyTree[Array]:
        levels, steps = 0, ts.shape[0] - 1
        while steps > _MAX_COARSEST:
            levels, steps = levels + 1, steps // _FACTOR

        def coarse(ts, y0, args):
            return CoarseGuess()(solver, terms, ts, y0, args, previous)

        def nested(ts, y0, args):
            guess = NestedGuess(levels, _FACTOR)
            return guess(solver, terms, ts, y0, args, previous)

        # If there are only CPUs, then do not spend time on tracing the other one.
        if levels == 0 or jax.default_backend() == "cpu":
            return coarse(ts, y0, args)
        else:
            return lax.platform_dependent(ts, y0, args, cpu=coarse, default=nested)


AutoGuess.__init__.__doc__ = """**Arguments:** None"""
