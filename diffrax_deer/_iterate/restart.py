"""What is beyond hope begins again."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._time_axis import at_index, first_of
from .._window import AbstractWindow, Iterate


# Corrections of more than this many times the largest value of the solution are wrong.
# Measured: with 1 and 2 some problems never get beyond some point, with 20 or without a
# bound many take more iterations.
_LIMIT = 4
# A component is taken to be no smaller than this part of the largest one.
_SMALLEST = 0.1
# Where corrections are below this part of the values, these are roughly right.
_ROUGHLY = 0.05


def too_large(
    y0: Float[Array, " size"], new: Iterate, delta: Iterate
) -> Bool[Array, " substeps"]:
    """Which corrections are far larger than the solution is, on that part of the window
    where it is roughly known."""
    size = jnp.max(jnp.abs(new.ys), axis=1, keepdims=True, initial=0)
    is_rough = jnp.any(jnp.abs(delta.ys) > _ROUGHLY * size, axis=1)
    index = jnp.arange(len(is_rough), dtype=jnp.int32)
    known = (index < first_of(is_rough))[:, None]
    size = jnp.max(jnp.where(known, jnp.abs(new.ys), 0), axis=0)
    size = jnp.maximum(size, jnp.abs(y0))
    limit = _LIMIT * jnp.maximum(size, _SMALLEST * jnp.max(size, initial=0))
    largest = jnp.max(jnp.abs(delta.ks), axis=(1, 2), initial=0)
    largest = jnp.maximum(largest, jnp.abs(delta.ys))
    return jnp.any(largest > limit[None], axis=1)


def restart(window: AbstractWindow, at: Iterate, first: Int[Array, ""]) -> Iterate:
    """From this substep on, takes the last value before it for a constant."""
    substeps = len(at.ys)
    again = (jnp.arange(substeps, dtype=jnp.int32) >= first)[:, None]
    last = at_index(window.starts(at.ys), jnp.minimum(first, substeps - 1))
    ys = jnp.where(again, last[None], at.ys)
    return Iterate(ys, jnp.where(again[..., None, None], 0, at.ks))
