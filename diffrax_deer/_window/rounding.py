"""Rounding errors, measured."""

import math
from collections.abc import Callable

import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


# How many neighbours the rounding errors of a substep are judged by, and how many times
# those of the neighbours they may be.
_NEIGHBOURS = 64
_OUTLIER = 8
# A multiple that is rounded differently.
_ODD = 1.37


def is_noisy(eps: float) -> bool:
    """Whether what is made from values of this precision may well be made in a lower
    one, as matrix products are, by default, in single precision on GPUs and TPUs."""
    return eps > 1e-12


def nearby(size: Float[Array, "*shape"], eps: float) -> Float[Array, "*shape"]:
    """How far away to look from, at a point of this size and precision: not so far that
    more than rounding errors can be seen, nor so near that these are all the same."""
    return 0.5 * math.sqrt(eps) * size


def noise(
    fn: Callable[[Array], Array],
    x: Float[Array, "substeps points size"],
    distance: Float[Array, "substeps points size"],
    wanted: Bool[Array, ""],
) -> Float[Array, "substeps parts points size"]:
    """How large the rounding errors of `fn(x)` may be. Zero if not wanted.

    Seen from near enough every function is a straight line, but for these. So its
    second differences are looked at, from a `distance`. (After Moré & Wild, Estimating
    Computational Noise, 2011.)
    """

    def measure():
        around = jnp.stack([x - distance, x, x + distance])
        left, middle, right = lax.map(fn, around)
        errors = (left - middle) + (right - middle)
        return _typical(errors, jnp.expand_dims(x, 1), middle)

    return _if_any(wanted, measure, fn, x)


def noise_of_linear(
    fn: Callable[[Array], Array],
    x: Float[Array, "substeps size"],
    fn_x: Float[Array, "substeps size"],
    wanted: Bool[Array, ""],
) -> Float[Array, "substeps size"]:
    """The same, if `fn` is linear."""
    measure = lambda: _typical(fn(_ODD * x) / _ODD - fn_x, x, fn_x)
    return _if_any(wanted, measure, fn, x)


def _typical(errors, x, fn_x):
    # Rounding errors are random, and may happen to be zero. So what counts is what is
    # typical of the neighbours, whose values however may be much larger.
    largest = lambda x: jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0)
    size = jnp.maximum(largest(x), largest(fn_x))
    relative = jnp.where(size == 0, 0, errors / jnp.where(size == 0, 1, size))
    rms = lambda x, axis: jnp.sqrt(jnp.mean(x**2, axis=axis))
    return _OUTLIER * size * among_neighbours(rms, relative)


def _if_any(wanted, measure, fn, x):
    like = jax.eval_shape(fn, x)
    zeros = lambda: jnp.zeros(like.shape, like.dtype)
    # In a batch, of all or of none.
    measured = lax.cond(eqxi.unvmap_any(wanted), measure, zeros)
    return jnp.where(wanted & jnp.isfinite(measured), measured, 0)


def among_neighbours(
    reduce: Callable, x: Float[Array, "substeps ..."]
) -> Float[Array, "substeps ..."]:
    """Reduces over blocks of neighbours, of which the last one is not shorter."""
    length = len(x)
    size = min(_NEIGHBOURS, length)
    # The last block overlaps with the one before.
    first = jnp.minimum(size * jnp.arange(-(-length // size)), length - size)
    index = first[:, None] + jnp.arange(size)[None]
    blocks = reduce(x[index], axis=1)
    return jnp.repeat(blocks, size, axis=0)[:length]
