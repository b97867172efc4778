import functools as ft
import math

import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import AbstractScan, Matrices


def clip(A, size):
    # In a recurrence which is exactly zero up to some term (as the correction to a
    # trajectory is, up to the front of substeps already exact), a product of matrices
    # that overflowed would turn these zeros into `0 * inf = nan`. With entries below
    # this bound no further product can overflow.
    bound = math.sqrt(float(jnp.finfo(A.dtype).max) / max(size, 1))
    return jnp.clip(A, -bound, bound)


def _matmul(A, B):
    return jnp.matmul(A, B, precision=lax.Precision.HIGHEST)


def _matvec(A, x):
    return _matmul(A, x[..., None])[..., 0]


def _compose(first, second):
    # `x -> A2 (A1 x + b1) + b2`.
    A1, b1 = first
    A2, b2 = second
    if A1.ndim == b1.ndim:
        return clip(A2 * A1, 1), A2 * b1 + b2
    else:
        return clip(_matmul(A2, A1), A1.shape[-1]), _matvec(A2, b1) + b2


def _compose_filters(first, second):
    # Lemma 8 of Särkkä & García-Fernández.
    A1, b1, C1, eta1, J1 = first
    A2, b2, C2, eta2, J2 = second
    if A1.ndim == b1.ndim:
        D = 1 / (1 + C1 * J2)
        A = A2 * D * A1
        b = A2 * D * (b1 + C1 * eta2) + b2
        C = A2 * D * C1 * A2 + C2
        eta = A1 * D * (eta2 - J2 * b1) + eta1
        J = A1 * D * J2 * A1 + J1
        return A, b, C, eta, J
    T = lambda X: jnp.swapaxes(X, -1, -2)
    eye = jnp.eye(b1.shape[-1], dtype=b1.dtype)
    A2_D = T(jnp.linalg.solve(eye + _matmul(J2, C1), T(A2)))
    A1T_D = T(jnp.linalg.solve(eye + _matmul(C1, J2), A1))
    A = _matmul(A2_D, A1)
    b = _matvec(A2_D, b1 + _matvec(C1, eta2)) + b2
    C = _matmul(_matmul(A2_D, C1), T(A2)) + C2
    eta = _matvec(A1T_D, eta2 - _matvec(J2, b1)) + eta1
    J = _matmul(_matmul(A1T_D, J2), A1) + J1
    return A, b, C, eta, J


# These unroll into many operations, so `jit` to trace them only once.


@ft.partial(jax.jit, static_argnames="reverse")
def _associative_scan(A, b, reverse):
    _, xs = lax.associative_scan(_compose, (A, b), reverse=reverse)
    return xs


@jax.jit
def _associative_filter(A, b, damping):
    keep, pull = 1 / (1 + damping), damping / (1 + damping)
    # Nothing comes before the first value, which is zero.
    A = A.at[0].set(0)
    if A.ndim == b.ndim:
        C = jnp.ones_like(A)
        eta, J = A * b, A * A
    else:
        C = jnp.broadcast_to(jnp.eye(b.shape[-1], dtype=b.dtype), A.shape)
        A_T = jnp.swapaxes(A, -1, -2)
        eta, J = _matvec(A_T, b), _matmul(A_T, A)
    filters = (keep * A, keep * b, keep * C, -pull * eta, pull * J)
    _, xs, _, _, _ = lax.associative_scan(_compose_filters, filters)
    return xs


class AssociativeScan(AbstractScan):
    r"""Evaluates the linear recurrence in parallel, with `jax.lax.associative_scan`.

    The affine maps $x \mapsto A_n x + b_n$ are composed pairwise, in $O(\log N)$
    rounds. This does $O(N d^3)$ work for $N$ substeps of a $d$-dimensional state, or
    $O(N d)$ with diagonal matrices. It is the best choice on a TPU, and on a GPU for
    matrices that are too large for [`diffrax_deer.KernelScan`][].

    ??? cite "References"

        ```bibtex
        @techreport{blelloch1990prefix,
            author={Blelloch, Guy E.},
            title={Prefix Sums and Their Applications},
            institution={School of Computer Science, Carnegie Mellon University},
            number={CMU-CS-90-190},
            year={1990},
        }
        ```

        With damping, it is the parallel Kalman filter of

        ```bibtex
        @article{sarkka2021temporal,
            author={S{\"a}rkk{\"a}, Simo and Garc{\'i}a-Fern{\'a}ndez, {\'A}ngel F.},
            title={Temporal Parallelization of Bayesian Smoothers},
            journal={IEEE Transactions on Automatic Control},
            volume={66},
            number={1},
            pages={299--306},
            year={2021},
        }
        ```
    """

    def __call__(
        self, A: Matrices, b: Float[Array, "substeps size"], *, reverse: bool = False
    ) -> Float[Array, "substeps size"]:
        return _associative_scan(A, b, reverse)

    def damped(
        self, A: Matrices, b: Float[Array, "substeps size"], damping: Float[Array, ""]
    ) -> Float[Array, "substeps size"]:
        return _associative_filter(A, b, damping)


AssociativeScan.__init__.__doc__ = """**Arguments:** None"""
