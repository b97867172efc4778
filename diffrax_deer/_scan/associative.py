import functools as ft
import math

import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import AbstractScan


def _clip(A):
    # In a recurrence which is exactly zero up to some term (as the correction to a
    # trajectory is, up to the front of substeps already exact), a product of matrices
    # that overflowed would turn these zeros into `0 * inf = nan`. With entries below
    # this bound no further product can overflow.
    bound = math.sqrt(float(jnp.finfo(A.dtype).max) / max(A.shape[-1], 1))
    return jnp.clip(A, -bound, bound)


def _compose(first, second):
    # `x -> A2 (A1 x + b1) + b2`.
    A1, b1 = first
    A2, b2 = second
    A = jnp.matmul(A2, A1, precision=lax.Precision.HIGHEST)
    b = jnp.matmul(A2, b1[..., None], precision=lax.Precision.HIGHEST)[..., 0] + b2
    return _clip(A), b


# This unrolls into many operations, so `jit` to trace them only once.
@ft.partial(jax.jit, static_argnames="reverse")
def _associative_scan(A, b, reverse):
    _, xs = lax.associative_scan(_compose, (A, b), reverse=reverse)
    return xs


class AssociativeScan(AbstractScan):
    r"""Evaluates the linear recurrence in parallel, with `jax.lax.associative_scan`.

    The affine maps $x \mapsto A_n x + b_n$ are composed pairwise, in $O(\log N)$
    rounds. This does $O(N d^3)$ work for $N$ substeps of a $d$-dimensional state, and
    is the best choice on a GPU or TPU.

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
        self,
        A: Float[Array, "substeps size size"],
        b: Float[Array, "substeps size"],
        *,
        reverse: bool = False,
    ) -> Float[Array, "substeps size"]:
        return _associative_scan(A, b, reverse)


AssociativeScan.__init__.__doc__ = """**Arguments:** None"""
