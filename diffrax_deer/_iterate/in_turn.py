"""What a CPU does best: one substep after the other."""

import dataclasses

import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import RESULTS

from .._failure import NONFINITE
from .._window import is_finite, Iterate
from .chord import by_chord, is_large
from .iteration import Iteration, JointSolution


def solve_in_turn(iteration: Iteration) -> JointSolution:
    """Solves one substep after the other.

    Explicit ones are made, as one iteration. Of implicit ones each is a window of its
    own, and `num_iterations` is that of the slowest. If one fails then so does the
    window.
    """
    window = iteration.window
    if window.is_explicit:
        return _made(iteration)

    def goes_on(state):
        index, _, _, so_far = state
        okay = so_far.result == RESULTS.successful
        return (index < substeps) & eqxi.unvmap_any(okay)

    def body(state):
        index, last, failures, so_far = state
        one = window.substep(index, last.ys[0])
        # What happened in the last substep is likely to happen again. (On another grid
        # it is of another length, but by less than twice.)
        guess = one.targets(last, last.ks)
        alone = dataclasses.replace(iteration, window=one)
        # In a batch others may go on.
        okay = so_far.result == RESULTS.successful
        max_iters = jnp.where(okay, alone.limit(guess), 0)
        alone = dataclasses.replace(alone, max_iters=max_iters)
        if is_large(iteration):
            new, failures = by_chord(alone, guess, failures)
        else:
            new = alone.run(guess)
        put = lambda x, y: lax.dynamic_update_slice_in_dim(x, y, index, axis=0)
        so_far = JointSolution(
            at=jtu.tree_map(put, so_far.at, new.at),
            num_iterations=jnp.maximum(so_far.num_iterations, new.num_iterations),
            span=so_far.span + new.span,
            result=RESULTS.where(okay, new.result, so_far.result),
        )
        stay = Iterate(last.ys, jnp.zeros_like(last.ks))
        okay = so_far.result == RESULTS.successful
        last = jtu.tree_map(lambda x, y: jnp.where(okay, x, y), new.at, stay)
        return index + 1, last, failures, so_far

    substeps, zero = len(jtu.tree_leaves(window.xs)[0]), jnp.array(0, jnp.int32)
    start = Iterate(window.y0[None], window.zeros(1).ks)
    at = jtu.tree_map(lambda x: jnp.broadcast_to(x, (substeps, *x.shape[1:])), start)
    solution = JointSolution(at, zero, zero, RESULTS.successful)
    init = zero, start, zero, solution
    *_, solution = lax.while_loop(goes_on, body, init)
    return solution


def _made(iteration: Iteration) -> JointSolution:
    at, (_, stages) = iteration.window.sequential(), iteration.window.stage_shape
    # What follows from something that is not finite is not finite.
    okay = is_finite(at.ys[-1])
    # Not as constants, of which JAX may make arrays of NumPy.
    count = lambda n: jnp.where(okay, n, n).astype(jnp.int32)
    return JointSolution(
        at=at,
        num_iterations=count(1),
        span=count(len(at.ys) * max(stages, 1)),
        result=RESULTS.where(okay, RESULTS.successful, NONFINITE),
    )
