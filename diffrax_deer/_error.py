"""The error of a window, as a step size controller sees it."""

import dataclasses

import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
from diffrax import RESULTS
from jaxtyping import Array, Float

from ._implicit import linear_solve
from ._iterate import Iteration, JointSolution
from ._window import Discretisation, Iterate


# A coarser grid need not have a solution, and then it is as well to find that out soon.
_MAX_ITERS = 16


def propagated_error(
    iteration: Iteration,
    solution: JointSolution,
    errors: Float[Array, "substeps size"],
) -> Float[Array, " size"]:
    """What errors made in the substeps have become at the end of the window."""
    window, at, A, scan = iteration.window, solution.at, solution.A, iteration.scan

    def from_scratch():
        # The derivative of the solution is what becomes of them.
        propagate = linear_solve(window, at, iteration.method, scan)
        b = Iterate(errors, jnp.zeros_like(at.ks))
        return propagate(jnp.zeros_like(window.y0), b).ys

    if A is None or A.ndim == errors.ndim:
        # Diagonals are not good enough: methods must not influence the error.
        propagated = from_scratch()
    else:
        propagated = lax.cond(
            eqxi.unvmap_all(solution.has_A), lambda: scan(A, errors), from_scratch
        )
    # That alone would miss it if an explicit solver is unstable on one part of the
    # window, and the difference to the true solution is then damped on another. So also
    # ask of each substep what the controller would ask of a single step. It compares
    # with the values at the ends of the window, hence the rescaling where the solution
    # is larger in between.
    starts, ys = window.starts(at.ys), at.ys
    size_at_ends = jnp.maximum(jnp.abs(starts[:1]), jnp.abs(ys[-1:]))
    size = jnp.maximum(jnp.abs(starts), jnp.abs(ys))
    rescale = jnp.where(size > size_at_ends, size_at_ends / size, 1)
    largest = jnp.max(jnp.abs(errors) * rescale, axis=0)
    return jnp.maximum(jnp.abs(propagated[-1]), largest)


def error_by_halving(
    problem: Discretisation, iteration: Iteration, at: Iterate
) -> Float[Array, " size"]:
    """The difference to the solution on a grid of half as many substeps, which is an
    estimate of the full order of the solver. Infinite if that cannot be found.

    If it is not used, as with constant steps, then XLA leaves it away.
    """
    coarse = problem.on(problem.ts[::2])
    iteration = dataclasses.replace(
        iteration, window=coarse.window, max_iters=_MAX_ITERS
    )
    guess = coarse.window.interpolated(at.ys[1::2])
    solution = iteration.run(guess)
    difference = jnp.abs(at.ys[-1] - solution.at.ys[-1])
    return jnp.where(solution.result == RESULTS.successful, difference, jnp.inf)
