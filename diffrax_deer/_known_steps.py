from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
from diffrax import AbstractStepSizeController, ConstantStepSize, StepTo
from jaxtyping import Array, PyTree, Real

from ._custom_types import IntScalarLike, RealScalarLike


def are_known(controller: AbstractStepSizeController) -> bool:
    """Whether a step size controller knows all of its steps in advance."""
    return type(controller) in (ConstantStepSize, StepTo)


def advance(
    controller: AbstractStepSizeController, state: PyTree[Any], steps: IntScalarLike
) -> PyTree[Any]:
    """The state of such a controller after some more steps."""
    if type(controller) is ConstantStepSize:
        steps_completed, *fixed = state
        return (steps_completed + steps, *fixed)
    else:
        return state + steps


def known_times(
    controller: AbstractStepSizeController,
    state: PyTree[Any],
    t0: RealScalarLike,
    tnext: RealScalarLike,
    t1: RealScalarLike,
    dt0: RealScalarLike | None,
    *,
    num_steps: int,
    size: int,
) -> Real[Array, " size_plus_1"]:
    """The times at which such a controller makes its next `num_steps` steps. After
    these, or once `t1` has been reached, steps of length zero follow.

    `state` and `tnext` are those before the first step has been made.
    """

    def end(n):
        # Only used without an end: then steps are added up.
        previous = t0 if dt0 is None else t0 + n.astype(first.dtype) * dt0
        state_n = advance(controller, state, n - 1)
        # Neither looks at any of what is missing.
        unused: Any = None
        _, _, end, _, _, _ = controller.adapt_step_size(
            previous, previous, unused, unused, unused, unused, unused, state_n
        )
        return jnp.asarray(end, first.dtype)

    first = jnp.stack([t0, tnext])
    later = jax.vmap(end)(jnp.arange(1, num_steps, dtype=jnp.int32))
    ts = jnp.concatenate([first, later])[: num_steps + 1]
    # As in `diffeqsolve`, which thus avoids tiny steps at the end.
    fixed_t1 = lax.stop_gradient(t1)
    almost_t1 = fixed_t1 - 100 * jnp.spacing(fixed_t1)
    ts = jnp.where((ts > almost_t1) | (ts >= t1), t1, ts)
    return jnp.concatenate([ts, jnp.repeat(ts[-1:], size - num_steps)])


def move_with(
    ts: Real[Array, " times"], anchors: list[Real[Array, "..."]]
) -> Real[Array, " times"]:
    """Let those `ts` that equal one of the `anchors`, up to a rounding error, have its
    derivative. The values are unchanged, and all other `ts` stay where they are.
    """
    ts = lax.stop_gradient(ts)
    moving = jnp.sort(jnp.concatenate([jnp.ravel(x) for x in anchors]))
    fixed = lax.stop_gradient(moving)
    right = jnp.clip(jnp.searchsorted(fixed, ts), 1, len(moving) - 1)
    left = right - 1
    nearest = jnp.where(ts - fixed[left] < fixed[right] - ts, left, right)
    # Jumps are stepped over, from the floating point number before to the one after.
    same = jnp.abs(ts - fixed[nearest]) <= 2 * jnp.spacing(jnp.abs(ts))
    difference = jnp.where(
        same & jnp.isfinite(fixed[nearest]), moving[nearest] - fixed[nearest], 0
    )
    return ts + difference
