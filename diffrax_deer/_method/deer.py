import math
from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._step import Window
from .base import AbstractMethod


# The Taylor polynomial of degree 4 of `exp(X)` is used up to this norm, where it is
# right to 3e-4.
_TAYLOR_RADIUS = 0.5
# More squarings than this are no better than an overflow.
_MAX_SQUARINGS = 64


def _matmul(A, B):
    return jnp.matmul(A, B, precision=lax.Precision.HIGHEST)


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


class DEER(AbstractMethod):
    r"""DEER: the full Jacobian of every substep, that is, Newton's method for all of
    the window at once.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{lim2024parallelizing,
            author={Lim, Yi Heng and Zhu, Qi and Selfridge, Joshua and
                    Kasim, Muhammad Firmansyah},
            title={Parallelizing non-linear sequential models over the sequence length},
            booktitle={International Conference on Learning Representations},
            year={2024},
        }
        ```
    """

    jacobian: Literal["linear_ode", "exact"] = eqx.field(
        default="linear_ode", static=True
    )

    def __check_init__(self):
        if self.jacobian not in ("linear_ode", "exact"):
            raise ValueError(
                "`DEER(jacobian=...)` must be either 'linear_ode' or 'exact', got "
                f"{self.jacobian!r}."
            )

    def linearise(
        self,
        window: Window,
        ys: Float[Array, "substeps size"],
    ) -> Float[Array, "substeps size size"]:
        step = window.step
        if (
            self.jacobian == "exact"
            or step.vector_field is None
            or step.exponential is None
        ):
            return window.jacobian(window.starts(ys))
        J = window.vector_field_jacobian(ys)
        X = _magnus(J, jnp.diff(window.ts).astype(J.dtype)[:, None, None])
        if step.exponential == "exact":
            return matrix_exponential(X)
        else:
            return matrix_polynomial(step.exponential, X)


DEER.__init__.__doc__ = """**Arguments:**

- `jacobian`: how to linearise a substep. Either
    - `"linear_ode"`: linearise the differential equation, and integrate that over the
        substep. This takes one Jacobian of the vector field per substep, and then the
        matrix exponential: for implicit solvers itself, and for explicit Runge--Kutta
        methods the polynomial that these use in its place, so that both are stable at
        the same step sizes. For all other solvers, and if the equation is no ordinary
        differential equation, this is the same as `"exact"`.
    - `"exact"`: the Jacobian of the wrapped solver's step. This takes one Jacobian of
        the vector field for each of its stages.
"""
