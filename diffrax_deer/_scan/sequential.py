import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import AbstractScan


class SequentialScan(AbstractScan):
    """Evaluates the linear recurrence one term after the other, with `jax.lax.scan`.

    It does the least work, $O(N d^2)$ for $N$ substeps of a $d$-dimensional state, and
    needs no memory but its output. This is the best choice on a CPU.
    """

    def __call__(
        self,
        A: Float[Array, "substeps size size"],
        b: Float[Array, "substeps size"],
        *,
        reverse: bool = False,
    ) -> Float[Array, "substeps size"]:
        def body(x, A_b):
            A_n, b_n = A_b
            # An elementwise product and a sum, as XLA fuses these into the loop. On
            # small states a call to a matrix product costs more than its arithmetic.
            x = jnp.sum(A_n * x[None], axis=-1) + b_n
            return x, x

        _, xs = lax.scan(body, jnp.zeros_like(b[0]), (A, b), reverse=reverse)
        return xs


SequentialScan.__init__.__doc__ = """**Arguments:** None"""
