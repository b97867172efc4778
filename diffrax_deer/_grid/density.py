"""Where the substeps of a window should be, given those that there are."""

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from .._custom_types import RealScalarLike
from .._window import Discretisation, Whole


# How often the density of substeps is averaged with that of its neighbours. It is an
# estimate, which may vanish by chance.
_SMOOTHINGS = 3
# No substep is more than this many times as long as one of average length.
_MAX_LENGTH = 10
# The length changes by so much of the distance that it changes over, so that that of
# neighbours differs by a factor of up to about `exp` of this.
_SLOPE = 0.5
_SLOPE_ITERATIONS = 4


class Shares(eqx.Module):
    """What substeps have of the error: `values` are proportional to their length, and
    to the power of `order` they are their errors."""

    values: Real[Array, " substeps"]
    order: float

    @property
    def error(self) -> Real[Array, ""]:
        """The sum of all errors."""
        return jnp.sum(self.values**self.order)

    @property
    def most_gain(self) -> Real[Array, ""]:
        """How many times smaller that would be if all shares were equal."""
        mean = jnp.mean(self.values)
        equal = jnp.where(mean > 0, mean, 1) ** self.order
        return self.error / (len(self.values) * equal)


def shares(
    problem: Discretisation, whole: Whole, scale: Float[Array, "substeps size"]
) -> Shares:
    """By the error estimates of the wrapped solver, relative to `scale`. If it has none
    then by the curvature of the solution."""
    y_errors = problem.outputs(whole).y_error
    order = problem.solver.error_order(problem.terms)
    if y_errors is not None and isinstance(order, (int, float)):
        errors = problem.scheme.ravel_all(y_errors, problem.substeps) / scale
    else:
        order = 2
        lengths = (problem.t1s - problem.t0s).astype(scale.dtype)[:, None]
        increments = (whole.at.ys - whole.starts) / scale
        slopes = increments / lengths
        bend = jnp.diff(slopes, axis=0)
        none = jnp.zeros_like(slopes[:1])
        bend = jnp.concatenate([none, bend]) + jnp.concatenate([bend, none])
        errors = bend * lengths / 2
    sizes = rms(errors).astype(problem.t0s.dtype)
    return Shares(sizes ** (1 / order), float(order))


def rms(errors: Float[Array, "substeps size"]) -> Float[Array, " substeps"]:
    """As by default in Diffrax, the root of the mean square."""
    return jnp.sqrt(jnp.sum(errors**2, axis=-1) / max(errors.shape[-1], 1))


def spread(
    fractions: Real[Array, " substeps_plus_1"],
    shares: Shares,
    shortest: RealScalarLike,
) -> tuple[Real[Array, " substeps_plus_1"], Real[Array, ""]]:
    """The grid on which all substeps have the same share of the error, and how many
    times smaller the sum of their errors is than on the present one.

    This is the equidistribution principle of adaptive codes for boundary value
    problems. No substep is shorter than `shortest`. They stay as they are if nothing is
    known of their errors.
    """
    lengths = jnp.diff(fractions)
    number, dtype = len(lengths), fractions.dtype
    density = raw = shares.values / lengths
    for _ in range(_SMOOTHINGS):
        padded = jnp.pad(density, 1, mode="edge")
        density = (padded[:-2] + 2 * density + padded[2:]) / 4
    is_known = jnp.all(jnp.isfinite(density)) & jnp.any(density > 0)
    density = jnp.where(is_known, density, 1)
    mean = jnp.sum(density * lengths)
    density = jnp.maximum(density, mean / _MAX_LENGTH)

    # From here on as what the lengths should be.
    wanted = 1 / density
    middles = (fractions[1:] + fractions[:-1]) / 2
    for _ in range(_SLOPE_ITERATIONS):
        wanted = wanted * jnp.sum(lengths / wanted) / number
        wanted = jnp.maximum(wanted, shortest)
        rise = _SLOPE * middles
        after = lax.cummin(wanted - rise) + rise
        before = lax.cummin(wanted + rise, reverse=True) - rise
        wanted = jnp.minimum(after, before)
    wanted = wanted * jnp.sum(lengths / wanted) / number

    # How many of the new substeps there are up to the end of each of the old ones.
    numbers = jnp.cumsum(lengths / wanted)
    numbers = jnp.concatenate([jnp.zeros(1, dtype), numbers * (number / numbers[-1])])
    new = jnp.interp(jnp.arange(number + 1, dtype=dtype), numbers, fractions)
    new = new.at[0].set(0).at[-1].set(1)
    new_error = jnp.sum(lengths / wanted * (raw * wanted) ** shares.order)
    gain = shares.error / jnp.where(new_error > 0, new_error, 1)
    return jnp.where(is_known, new, fractions), jnp.where(is_known, gain, 1)
