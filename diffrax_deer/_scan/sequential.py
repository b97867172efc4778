import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._linear_algebra import Matrices, matvec
from .base import AbstractScan


class SequentialScan(AbstractScan):
    """Evaluates the linear recurrence one term after the other, with `jax.lax.scan`.

    It does the least work, $O(N d^2)$ for $N$ substeps of a $d$-dimensional state, and
    needs no memory but its output. This is the best choice on a CPU.
    """

    def __call__(
        self, A: Matrices, b: Float[Array, "substeps size"], *, reverse: bool = False
    ) -> Float[Array, "substeps size"]:
        def body(x, A_b):
            A_n, b_n = A_b
            x = matvec(A_n, x) + b_n
            return x, x

        _, xs = lax.scan(body, jnp.zeros_like(b[0]), (A, b), reverse=reverse)
        return xs


SequentialScan.__init__.__doc__ = """**Arguments:** None"""
