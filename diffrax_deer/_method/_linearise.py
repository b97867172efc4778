import math
from collections.abc import Sequence

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._window import AbstractWindow, has_linear_ode


# The Taylor polynomial of degree 4 of `exp(X)` is used up to this norm, where it is
# right to 3e-4.
_TAYLOR_RADIUS = 0.5
# Matrices of which the products need no help.
_SMALL = 8
# More squarings than this are no better than an overflow.
_MAX_SQUARINGS = 64


def full_jacobians(
    window: AbstractWindow, ys: Float[Array, "substeps size"], *, exact: bool
) -> Float[Array, "substeps size size"]:
    """The Jacobian of every substep, or an approximation that takes only one Jacobian
    of the vector field for each of them."""
    if exact or not has_linear_ode(window):
        return window.jacobian(window.starts(ys))
    step = window.step
    assert step.exponential is not None
    J = window.vector_field_jacobian(ys)
    X = _magnus(J, jnp.diff(window.ts).astype(J.dtype)[:, None, None])
    if step.exponential == "exact":
        return matrix_exponential(X)
    else:
        return matrix_polynomial(step.exponential, X)


def diagonal_jacobians(
    window: AbstractWindow,
    ys: Float[Array, "substeps size"],
    *,
    exact: bool,
    samples: int | None,
    key: PRNGKeyArray | None,
) -> Float[Array, "substeps size"]:
    """The same for the diagonals of the Jacobians, without ever forming these."""
    if exact or not has_linear_ode(window):
        return _diagonals(window.ends, window.starts(ys), samples, key)
    step = window.step
    assert step.exponential is not None

    def vector_field(ys):
        assert step.vector_field is not None
        return jax.vmap(step.vector_field)(window.ts[1:], ys)

    J = _diagonals(vector_field, ys, samples, key)
    # As diagonal matrices commute, the average over the substep is all there is. Only
    # that of the first substep is unknown, and it is not used.
    J = jnp.concatenate([jnp.zeros_like(J[:1]), (J[:-1] + J[1:]) / 2])
    X = jnp.diff(window.ts).astype(J.dtype)[:, None] * J
    if step.exponential == "exact":
        return jnp.exp(X)
    else:
        out = jnp.zeros_like(X)
        for coefficient in reversed(step.exponential):
            out = out * X + coefficient
        return out


def _diagonals(fn, xs, samples, key):
    # `fn` maps rows to rows. All of them are moved at once, and one direction follows
    # the other: that takes no more memory than `fn` itself.
    _, jvp = jax.linearize(fn, xs)
    size = xs.shape[-1]
    if samples is None:

        def column(i):
            unit = jnp.zeros(size, xs.dtype).at[i].set(1)
            return jvp(jnp.broadcast_to(unit, xs.shape))[:, i]

        return lax.map(column, jnp.arange(size, dtype=jnp.int32)).T
    else:

        def add_sample(total, key):
            sign = jr.rademacher(key, xs.shape, xs.dtype)
            return total + sign * jvp(sign), None

        total, _ = lax.scan(add_sample, jnp.zeros_like(xs), jr.split(key, samples))
        return total / samples


def _matmul(A, B):
    def product(A, B):
        return jnp.matmul(A, B, precision=lax.Precision.HIGHEST)

    def sum_of_products(A, B):
        return jnp.sum(A[..., None] * B[..., None, :, :], axis=-2)

    # GPUs spend most of a small matrix product on what makes a large one fast.
    if A.shape[-1] <= _SMALL:
        return lax.platform_dependent(A, B, cpu=product, default=sum_of_products)
    else:
        return product(A, B)


def matrix_exponential(X: Float[Array, "n size size"]) -> Float[Array, "n size size"]:
    # By scaling and squaring, like `jax.scipy.linalg.expm`. That is accurate to machine
    # precision, for the price of a linear solve (and, when batched, of five rational
    # approximations, of which it picks one). Here a few digits suffice, as a matrix
    # exponential is an approximation to a Jacobian in the first place.
    size = X.shape[-1]
    norm = jnp.max(jnp.sum(jnp.abs(X), axis=-1), initial=0)
    squarings = jnp.ceil(jnp.log2(norm / _TAYLOR_RADIUS))
    squarings = jnp.where(jnp.isfinite(norm), squarings, 0)
    squarings = jnp.clip(squarings, 0, _MAX_SQUARINGS)
    X = X * jnp.exp2(-squarings)
    eye = jnp.eye(size, dtype=X.dtype)[None]
    X2 = _matmul(X, X)
    exp_X = eye + X + _matmul(X2, eye / 2 + X / 6 + X2 / 24)
    return lax.fori_loop(
        0, squarings.astype(jnp.int32), lambda _, A: _matmul(A, A), exp_X
    )


def _magnus(
    J: Float[Array, "n size size"], dt: Float[Array, "n 1 1"]
) -> Float[Array, "n size size"]:
    # The logarithm of the solution of `dx/dt = J(t) x` over each substep, from `J` at
    # the ends of the substeps. To fourth order, for no more Jacobians than the lowest
    # order would take, as the neighbouring substeps are at hand. That of the first
    # substep is not used, so that no `J` is needed at the start of the window. (Blanes,
    # Casas, Oteo & Ros, The Magnus expansion and some of its applications, 2009.)
    none = jnp.zeros_like(J[:1])
    if J.shape[0] == 1:
        return none
    dt = dt[1:]
    before, after = J[:-1], J[1:]
    slope = _divide(after - before, dt)
    # The second derivative, from each pair of neighbouring substeps.
    curvature = _divide(2 * jnp.diff(slope, axis=0), dt[:-1] + dt[1:])
    curvature = jnp.where((dt[:-1] == 0) | (dt[1:] == 0), 0, curvature)
    curvature = jnp.concatenate([none, curvature]) + jnp.concatenate([curvature, none])
    integral = (before + after) / 2 - dt**2 * curvature / 24
    commutator = (_matmul(after, before) - _matmul(before, after)) / 12
    log = dt * (integral + dt * commutator)
    return jnp.concatenate([none, log])


def _divide(x, dt):
    # A window may be padded with substeps of length zero.
    return jnp.where(dt == 0, 0, x / jnp.where(dt == 0, 1, dt))


def matrix_polynomial(
    coefficients: Sequence[float], X: Float[Array, "n size size"]
) -> Float[Array, "n size size"]:
    # By Paterson--Stockmeyer: of degree `m`, with about `2 sqrt(m)` products.
    degree = len(coefficients) - 1
    block = max(math.isqrt(degree), 1)
    powers = [jnp.broadcast_to(jnp.eye(X.shape[-1], dtype=X.dtype), X.shape), X]
    while len(powers) <= block:
        powers.append(_matmul(powers[-1], X))
    out = None
    for start in reversed(range(0, degree + 1, block)):
        terms = zip(coefficients[start : start + block], powers)
        part = jnp.asarray(sum(c * power for c, power in terms))
        out = part if out is None else part + _matmul(out, powers[block])
    assert out is not None
    return out
