from typing import Literal

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._step import OneStepMap
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
    norm = jnp.max(jnp.sum(jnp.abs(X), axis=-1))
    squarings = jnp.ceil(jnp.log2(norm / _TAYLOR_RADIUS))
    squarings = jnp.where(jnp.isfinite(norm), squarings, 0)
    squarings = jnp.clip(squarings, 0, _MAX_SQUARINGS)
    X = X * jnp.exp2(-squarings)
    eye = jnp.eye(size, dtype=X.dtype)
    X2 = _matmul(X, X)
    exp_X = eye + X + _matmul(X2, eye / 2 + X / 6 + X2 / 24)
    return lax.fori_loop(
        0, squarings.astype(jnp.int32), lambda _, A: _matmul(A, A), exp_X
    )


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
        step: OneStepMap,
        y0: Float[Array, " size"],
        ys: Float[Array, "substeps size"],
    ) -> Float[Array, "substeps size size"]:
        if self.jacobian == "linear_ode" and step.vector_field is not None:
            # The Jacobian at the middle of each substep, up to second order. As that of
            # the first substep is not used, we need none at `y0`.
            J_end = step.vector_field_jacobian(ys)
            J_start = jnp.concatenate([J_end[:1], J_end[:-1]])
            dt = jnp.diff(step.ts).astype(J_end.dtype)
            return matrix_exponential(0.5 * dt[:, None, None] * (J_start + J_end))
        else:
            return step.jacobian(jnp.concatenate([y0[None], ys[:-1]]))


DEER.__init__.__doc__ = """**Arguments:**

- `jacobian`: how to linearise a substep. Either
    - `"linear_ode"`: integrate the linearised differential equation exactly, as in the
        paper: the matrix exponential of `dt` times the Jacobian of the vector field.
        This takes one Jacobian of the vector field per substep. Where the equation is
        no ordinary differential equation this is the same as `"exact"`.
    - `"exact"`: the Jacobian of the wrapped solver's step. This takes one Jacobian of
        the vector field for each of its stages.
"""
