import functools as ft
import math

import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._linear_algebra import matmul, Matrices, matvec
from .base import AbstractScan


def clip(A, size):
    # In a recurrence which is exactly zero up to some term (as the correction to a
    # trajectory is, up to the front of substeps already exact), a product of matrices
    # that overflowed would turn these zeros into `0 * inf = nan`. With entries below
    # this bound no further product can overflow.
    bound = math.sqrt(float(jnp.finfo(A.dtype).max) / max(size, 1))
    return jnp.clip(A, -bound, bound)


def _compose(first, second):
    # `x -> A2 (A1 x + b1) + b2`.
    A1, b1 = first
    A2, b2 = second
    if A1.ndim == b1.ndim:
        return clip(A2 * A1, 1), A2 * b1 + b2
    else:
        return clip(matmul(A2, A1), A1.shape[-1]), matvec(A2, b1) + b2


# This unrolls into many operations, so `jit` to trace them only once.
@ft.partial(jax.jit, static_argnames="reverse")
def _associative_scan(A, b, reverse):
    _, xs = lax.associative_scan(_compose, (A, b), reverse=reverse)
    return xs


class AssociativeScan(AbstractScan):
    r"""Evaluates the linear recurrence in parallel, with `jax.lax.associative_scan`.

    The affine maps $x \mapsto A_n x + b_n$ are composed pairwise, in $O(\log N)$
    rounds. This does $O(N d^3)$ work for $N$ substeps of a $d$-dimensional state, or
    $O(N d)$ with diagonal matrices. It is the best choice on a TPU, and on a GPU for
    matrices that are too large for [`diffrax_deer.KernelScan`][].

    ??? cite "Reference"

        ```bibtex
        @techreport{blelloch1990prefix,
            author={Blelloch, Guy E.},
            title={Prefix Sums and Their Applications},
            institution={School of Computer Science, Carnegie Mellon University},
            number={CMU-CS-90-190},
            year={1990},
        }
        ```
    """

    def __call__(
        self, A: Matrices, b: Float[Array, "substeps size"], *, reverse: bool = False
    ) -> Float[Array, "substeps size"]:
        return _associative_scan(A, b, reverse)


AssociativeScan.__init__.__doc__ = """**Arguments:** None"""
