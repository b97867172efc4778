"""What saves most of the Jacobians of a large implicit substep, and their inverses."""

import dataclasses
from typing import cast

import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import RESULTS
from jaxtyping import Array, Int

from .._failure import TOO_MANY_ITERATIONS
from .._linear_algebra import matvec
from .._method import AbstractFullMethod
from .._window import Iterate, StageWindow
from .convergence import Convergence
from .iteration import excesses_of, Iteration, JointSolution, terms_of


# From this size of the state on, to linearise takes longer than some more iterations.
_LARGE = 8
# What is not solved by so many iterations is rarely solved by more.
_MAX_ITERS = 16
# The fraction of the tolerance that corrections have to reach if residuals cannot.
_SMALL = 0.1
# If it fails in so many substeps in a row then it is not tried any more. (It often
# fails in the first ones, for which there is no good guess yet.)
_MOST_FAILURES = 4


def is_large(iteration: Iteration) -> bool:
    """Whether substeps should be solved in this way, one after the other."""
    is_full = isinstance(iteration.method, AbstractFullMethod)
    return is_full and iteration.window.y0.size >= _LARGE


def by_chord(
    iteration: Iteration, guess: Iterate, failures: Int[Array, ""]
) -> tuple[JointSolution, Int[Array, ""]]:
    """Solves a single substep by a chord method, with one Jacobian for all stages and
    iterations, or if that fails, or has failed too often, by Newton's method.

    `failures` says in how many substeps in a row it has. Also returns in how many now.
    """
    tries, zero = failures < _MOST_FAILURES, jnp.array(0, jnp.int32)
    nothing = JointSolution(guess, zero, zero, TOO_MANY_ITERATIONS)
    first = lax.cond(
        eqxi.unvmap_any(tries),
        lambda: _chord(iteration, guess, jnp.where(tries, _MAX_ITERS, 0)),
        lambda: nothing,
    )
    fails = first.result != RESULTS.successful
    max_iters = jnp.where(fails, iteration.limit(guess), 0)

    def newton():
        # Where a chord method has led to may be further away than the guess.
        second = dataclasses.replace(iteration, max_iters=max_iters).run(guess)
        pick = lambda x, y: jnp.where(fails, x, y)
        return JointSolution(
            at=jtu.tree_map(pick, second.at, first.at),
            num_iterations=first.num_iterations + second.num_iterations,
            span=first.span + second.span,
            result=RESULTS.where(fails, second.result, first.result),
        )

    solution = lax.cond(eqxi.unvmap_any(fails), newton, lambda: first)
    return solution, jnp.where(fails, failures + 1, 0)


def _chord(
    iteration: Iteration, guess: Iterate, max_iters: Int[Array, ""]
) -> JointSolution:
    window, method = cast(StageWindow, iteration.window), iteration.method
    _, jacobians = method.linearise(*window.middle(guess))
    J = jacobians()
    J = jnp.where(jnp.isfinite(J), J, 0)
    system = window.eliminate(J)
    max_iters = jnp.minimum(iteration.limit(guess), max_iters)

    def is_solved(seen, terms):
        """Whether there is nothing left but rounding errors."""
        # That corrections are small would not tell: where this Jacobian is far too
        # large, all of them are.
        excesses = excesses_of(seen.r, iteration.rounding(seen, terms))
        return jnp.all((excesses <= 1) & seen.exists)

    def goes_on(state):
        _, _, num_iterations, is_exact, is_lost = state
        return jnp.invert(is_exact | is_lost) & (num_iterations < max_iters)

    def step(state):
        at, convergence, num_iterations, _, _ = state
        seen = iteration.look(at)
        # Not at first sight, as in any iteration for a single substep.
        is_exact = is_solved(seen, terms_of(J, seen.points)) & (num_iterations > 0)
        new, is_usable = seen.corrected(system.condense(seen.r))
        change = iteration.change(at, new)
        is_lost = convergence.is_standstill(change) | jnp.invert(jnp.all(is_usable))
        # A last correction is of use for what is still slightly wrong in every substep.
        return new, Convergence(change), num_iterations + 1, is_exact, is_lost

    def stands_still():
        # Where it is very stiff, the Jacobians of the stages amplify rounding errors.
        seen = iteration.look(at)
        terms = matvec(jnp.abs(seen.jacobians()), jnp.abs(seen.points)[:, None])
        return is_solved(seen, terms)

    zero, no = jnp.array(0, jnp.int32), jnp.array(False)
    init = guess, Convergence(jnp.array(0, guess.ys.dtype)), zero, no, no
    at, convergence, num_iterations, is_exact, is_lost = lax.while_loop(
        goes_on, step, init
    )
    # In the directions in which it is not stiff, the corrections do say how far it is.
    may_be = is_lost & jnp.invert(is_exact) & (convergence.change < _SMALL)
    is_exact = is_exact | may_be & lax.cond(
        eqxi.unvmap_any(may_be), stands_still, lambda: no
    )
    result = RESULTS.where(is_exact, RESULTS.successful, TOO_MANY_ITERATIONS)
    span = method.span(guess.ys.shape[1])
    span = num_iterations + span + jnp.where(may_be, 1 + span, 0)
    return JointSolution(at, num_iterations, span, result)
