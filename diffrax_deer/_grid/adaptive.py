import dataclasses
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractBrownianPath, RESULTS
from jaxtyping import Array, Bool, Float, Int, Real

from .._checks import check_positive_int, check_tolerance
from .._collocation import AbstractCollocation
from .._custom_types import RealScalarLike
from .._error import halve
from .._iterate import JointSolution
from .._window import Discretisation, Iterate, Whole
from .base import AbstractGrid, Guess, Placed, Solve
from .density import rms, shares, spread


# Of the error, by how much a move has to reduce it.
_WORTHWHILE = 2.0
# In units of the tolerance. If the errors of all substeps together are no larger than
# this, then the solution is accurate enough, unless they grow a thousandfold later on.
_NO_ERROR = 1e-3
# For all solves but the first one, whose guess is a solution already.
_MAX_ITERS = 32
# Interpolations are at least as accurate as a cubic polynomial, or as the solver is.
_STAGES = 3
# In units of the precision of times.
_SHORTEST = 64
# If there is no tolerance, then components are compared with their size. Those that are
# this much smaller than the largest one do not count.
_NEGLIGIBLE = 1e-6


class AdaptiveGrid(AbstractGrid):
    r"""The substeps of a window are short where the solution changes quickly, and long
    where it does not, such that each has about the same share of the error.

    The window is solved on equal substeps first. Then these move, and it is solved
    again, from the solution at hand, which takes few iterations. This is repeated until
    it would not pay any more, but at most `max_moves` times. (They stay where they are
    if all errors are much smaller than the tolerance already.) So all that an adaptive
    step size controller does in many steps that follow one another is done in parallel.

    - The error of each substep is the estimate of the wrapped solver. If it has none
        then the curvature of the solution takes its place.
    - The lengths of neighbouring substeps differ by a factor of about 2 at most.
    - With an adaptive step size controller, windows grow to what `substeps` well-placed
        points can do.
    - With a tolerance, and constant steps, the solution either is that accurate, or the
        solve fails (with `diffrax.RESULTS.dt_min_reached`). This is judged by the
        difference to the solution on every second point, at these and in between. How
        many substeps it would have taken is in `solver_state.required_substeps`, if
        asked for with `SaveAt(solver_state=True)` and `throw=False`.
    - Derivatives are those of the wrapped solver on the final grid. That points depend
        on the solution is not differentiated, just as Diffrax does not differentiate
        adaptive step sizes.

    !!! example

        ```python
        solver = DeerSolver(substeps=512, grid=AdaptiveGrid(rtol=1e-6, atol=1e-8))
        sol = diffeqsolve(term, solver, t0, t1, dt0=t1 - t0, y0=y0)
        ```

    ??? cite "Reference"

        Collocation on grids that are adapted to the error in this way is described in:

        ```bibtex
        @book{ascher1995numerical,
            author={Ascher, Uri M. and Mattheij, Robert M. M. and Russell, Robert D.},
            title={Numerical solution of boundary value problems for ordinary
                   differential equations},
            publisher={SIAM},
            year={1995},
        }
        ```
    """

    rtol: RealScalarLike | None = None
    atol: RealScalarLike | None = None
    max_moves: int = eqx.field(default=4, static=True)

    def __check_init__(self) -> None:
        check_tolerance(self.rtol, "AdaptiveGrid(rtol=...)")
        check_tolerance(self.atol, "AdaptiveGrid(atol=...)")
        if (self.rtol is None) != (self.atol is None):
            raise ValueError(
                "`AdaptiveGrid(rtol=..., atol=...)` must either both be given or both "
                f"be left out, got rtol={self.rtol} and atol={self.atol}."
            )
        check_positive_int(self.max_moves, "AdaptiveGrid(max_moves=...)")

    @property
    def is_uniform(self) -> bool:
        return False

    def init(
        self, substeps: int, dtype: Any
    ) -> tuple[Real[Array, " substeps_plus_1"], Int[Array, ""] | None]:
        fractions = jnp.linspace(0, 1, substeps + 1, dtype=dtype)
        if self.rtol is None:
            return fractions, None
        if substeps == 1:
            raise ValueError(
                "`DeerSolver(substeps=1, grid=AdaptiveGrid(rtol=..., atol=...))` "
                "cannot tell how accurate it is. Use more `substeps`, or leave out "
                "`rtol` and `atol`."
            )
        return fractions, jnp.array(substeps, jnp.int32)

    def place(self, problem: Discretisation, guess: Guess, solve: Solve) -> Placed:
        zero = jnp.array(0, jnp.int32)

        def body(state: _State) -> _State:
            here = problem.moved(state.next)
            is_first = state.num_moves == 0
            max_iters = jnp.where(is_first, jnp.iinfo(jnp.int32).max, _MAX_ITERS)
            before = state.solution
            # In a batch, all or none.
            at, span = lax.cond(
                eqxi.unvmap_all(is_first),
                lambda: guess(here),
                lambda: (
                    _interpolate(problem.moved(state.fractions), before.at, here),
                    zero,
                ),
            )
            solution = solve(here, at, max_iters)
            okay = solution.result == RESULTS.successful
            whole = here.whole(solution.at)
            parts = shares(here, whole, self._scale(whole))
            may_move = okay & (parts.most_gain > _WORTHWHILE)
            may_move = may_move & (state.num_moves < self.max_moves)
            if self.rtol is not None:
                may_move = may_move & (parts.error > _NO_ERROR)
            fractions, gain = lax.cond(
                eqxi.unvmap_any(may_move),
                lambda: spread(state.next, parts, _shortest(problem)),
                lambda: (state.next, jnp.ones_like(state.next[0])),
            )
            moves = may_move & (gain > _WORTHWHILE)
            # If it has moved to where there is no solution, then back.
            is_better = okay | is_first
            select = lambda x, y: jtu.tree_map(
                lambda x, y: jnp.where(is_better, x, y), x, y
            )
            return _State(
                fractions=select(state.next, state.fractions),
                # With what all of them have taken.
                solution=dataclasses.replace(
                    select(solution, before),
                    num_iterations=before.num_iterations + solution.num_iterations,
                    span=before.span + span + solution.span,
                ),
                next=fractions,
                num_moves=state.num_moves + 1,
                moves=moves,
            )

        at = problem.window.zeros(problem.substeps)
        nothing = JointSolution(at, zero, zero, RESULTS.successful)
        fractions = problem.fractions
        # A loop, in which the solve is compiled only once.
        state = lax.while_loop(
            lambda state: state.moves,
            body,
            _State(fractions, nothing, fractions, zero, jnp.array(True)),
        )
        fractions, solution = state.fractions, state.solution
        if self.rtol is None or self.atol is None:
            return Placed(fractions, solution, None, True)
        factor, required, span = self._judge(problem.moved(fractions), solution, solve)
        solution = dataclasses.replace(solution, span=solution.span + span)
        return Placed(fractions, solution, required, factor <= 1)

    def _scale(self, whole: Whole) -> Float[Array, "#substeps size"]:
        """What the errors of all substeps are compared with."""
        ys = whole.at.ys
        sizes = jnp.maximum(jnp.abs(whole.starts), jnp.abs(ys))
        if self.rtol is None or self.atol is None:
            sizes = jnp.max(sizes, axis=0, keepdims=True, initial=0)
            largest = jnp.max(sizes, initial=0)
            scale = jnp.maximum(sizes, _NEGLIGIBLE * largest)
            return jnp.where(scale > 0, scale, 1)
        rtol, atol = (jnp.asarray(x, ys.dtype) for x in (self.rtol, self.atol))
        return atol + rtol * sizes

    def _judge(
        self, problem: Discretisation, solution: JointSolution, solve: Solve
    ) -> tuple[Real[Array, ""], Int[Array, ""], Int[Array, ""]]:
        """How many times too coarse the grid is, how many substeps would be enough, and
        the span.

        On a grid of every second point, errors are larger by as much as the order says.
        Those in between, of interpolations, may be of a lower order.
        """
        at, order = solution.at, _order(problem)
        coarse, last, solution_on_half = halve(problem, at, solve)
        # Of every substep of the coarse grid that is about a quarter and three. (If the
        # first one stays as it is, then that is taken twice.)
        middles = (problem.t0s + problem.t1s) / 2
        twice = problem.substeps % 2
        pairs = jnp.pad(middles, (twice, 0), mode="edge").reshape(-1, 2)
        whole = problem.whole(at)
        scale = self._scale(whole)

        def size(errors, scale):
            norms = rms(errors / scale)
            return jnp.max(norms, initial=0).astype(problem.t0s.dtype)

        on_half = coarse.whole(solution_on_half.at)
        at_points = size(on_half.at.ys - whole.at.ys[last], scale[last])
        between = jtu.tree_map(
            lambda x, y: x[twice:] - y,
            coarse.evaluate_within(on_half, pairs),
            problem.evaluate_within(whole, middles[:, None]),
        )
        between = size(problem.scheme.ravel_all(between, problem.substeps), scale)
        errors = (at_points, order), (between, _interpolation_order(problem, order))
        # For each of the two kinds, by how much a grid is too coarse.
        factors = jnp.stack([(error / (2**p - 1)) ** (1 / p) for error, p in errors])
        okay = solution.result == RESULTS.successful
        okay = okay & (solution_on_half.result == RESULTS.successful)
        # If not even that has a solution then nothing is known.
        factor = jnp.where(okay, jnp.max(factors), 2.0)
        required = jnp.ceil(problem.substeps * factor).astype(jnp.int32)
        return factor, jnp.maximum(required, 1), solution_on_half.span


class _State(eqx.Module):
    # The best grid so far, and the solution on it. (Before the first one, nothing.)
    fractions: Real[Array, " substeps_plus_1"]
    solution: JointSolution
    # That to solve it on next.
    next: Real[Array, " substeps_plus_1"]
    num_moves: Int[Array, ""]
    moves: Bool[Array, ""]


def _interpolate(
    problem: Discretisation, at: Iterate, other: Discretisation
) -> Iterate:
    """The solution, as a guess on another grid."""
    ys = other.ravel_all(problem.evaluate(at, other.t1s))
    return other.window.finite(other.window.interpolated(ys))


def _order(problem: Discretisation) -> RealScalarLike:
    """Of the errors of single paths, if there is any randomness."""
    is_path = lambda x: isinstance(x, AbstractBrownianPath)
    leaves = jtu.tree_leaves(problem.terms, is_leaf=is_path)
    if any(map(is_path, leaves)):
        order = problem.solver.strong_order(problem.terms)
    else:
        order = problem.solver.order(problem.terms)
    return 1 if order is None else order


def _interpolation_order(
    problem: Discretisation, order: RealScalarLike
) -> RealScalarLike:
    solver = problem.solver
    # That of the polynomial. Few other solvers say what theirs is.
    stages = solver.stages if isinstance(solver, AbstractCollocation) else _STAGES
    return min(order, stages + 1)


def _shortest(problem: Discretisation) -> Real[Array, ""]:
    """How short substeps may be, as a fraction of the window."""
    t0, t1 = problem.t0s[0], problem.t1s[-1]
    precision = jnp.spacing(jnp.maximum(jnp.abs(t0), jnp.abs(t1)))
    return _SHORTEST * precision / jnp.where(t0 == t1, 1, t1 - t0)


AdaptiveGrid.__init__.__doc__ = """**Arguments:**

- `rtol`, `atol`: the error that is allowed, relative to the size of the solution and
    absolute. Positive numbers. By default there is no tolerance: this is for adaptive
    step size controllers, which have their own. Then the errors of the components of
    the state count relative to the largest value that each has in the window.
- `max_moves`: how often points may move in a window. A positive integer.
"""
