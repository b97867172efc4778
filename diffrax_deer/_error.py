"""The error of a window, as a step size controller sees it."""

from collections.abc import Callable

import jax.numpy as jnp
from diffrax import RESULTS
from jaxtyping import Array, Float

from ._iterate import JointSolution
from ._window import Discretisation, Iterate, Whole


# A coarser grid need not have a solution, and then it is as well to find that out soon.
_MAX_ITERS = 16


def accumulated_error(
    starts: Float[Array, "substeps size"],
    ys: Float[Array, "substeps size"],
    errors: Float[Array, "substeps size"],
) -> Float[Array, " size"]:
    """What the error estimates of all substeps amount to. Those that are systematic add
    up, and so do the squares of those that are random: the larger of the two.

    As with a single step, this is about the errors that are made, and not about what
    the differential equation then makes of them.
    """
    # The controller compares with the values at the ends of the window, hence this
    # where the solution is larger in between.
    size_at_ends = jnp.maximum(jnp.abs(starts[:1]), jnp.abs(ys[-1:]))
    size = jnp.maximum(jnp.abs(starts), jnp.abs(ys))
    errors = errors * jnp.where(size > size_at_ends, size_at_ends / size, 1)
    # In units of the largest one, whose square might overflow.
    unit = jnp.max(jnp.abs(errors), axis=0, keepdims=True)
    errors = errors / jnp.where(unit > 0, unit, 1)
    random = jnp.sqrt(jnp.sum(errors**2, axis=0))
    return unit[0] * jnp.maximum(jnp.abs(jnp.sum(errors, axis=0)), random)


def error_by_halving(
    problem: Discretisation,
    whole: Whole,
    at: Iterate,
    solve: Callable[..., JointSolution],
) -> Float[Array, " size"]:
    """The difference to the solution on a grid of half as many substeps, which is an
    estimate of the full order of the solver. Infinite if that cannot be found.

    If it is not used, as with constant steps, then XLA leaves it away.
    """
    coarse, _, solution = halve(problem, at, solve)
    difference = jnp.abs(whole.y1 - coarse.whole(solution.at).y1)
    return jnp.where(solution.result == RESULTS.successful, difference, jnp.inf)


def halve(
    problem: Discretisation, at: Iterate, solve: Callable[..., JointSolution]
) -> tuple[Discretisation, slice, JointSolution]:
    """The window on a grid of every second point, which substeps end there, and the
    solution, given that on all of them. `solve` is a function
    `(problem, guess, max_iters) -> solution`."""
    # The first substep stays as it is if their number is odd.
    last = slice(1 - problem.substeps % 2, None, 2)
    coarse = problem.on(jnp.append(problem.t0s[0], problem.t1s[last]))
    guess = coarse.window.interpolated(at.ys[last])
    return coarse, last, solve(coarse, guess, _MAX_ITERS)
