import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import AbstractScan, Matrices


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
            x = _matvec(A_n, x) + b_n
            return x, x

        _, xs = lax.scan(body, jnp.zeros_like(b[0]), (A, b), reverse=reverse)
        return xs

    def damped(
        self, A: Matrices, b: Float[Array, "substeps size"], damping: Float[Array, ""]
    ) -> Float[Array, "substeps size"]:
        size = b.shape[-1]
        is_diagonal = A.ndim == b.ndim
        one = jnp.ones(size, b.dtype) if is_diagonal else jnp.eye(size, dtype=b.dtype)

        def body(carry, A_b):
            x, P = carry
            A_n, b_n = A_b
            x = _matvec(A_n, x) + b_n
            if is_diagonal:
                P = A_n * P * A_n + one
                gain = 1 / (1 + damping * P)
                x, P = gain * x, gain * P
            else:
                P = A_n @ P @ A_n.T + one
                x_P = jnp.concatenate([x[:, None], P], axis=1)
                x_P = jnp.linalg.solve(one + damping * P, x_P)
                x, P = x_P[:, 0], x_P[:, 1:]
            return (x, P), x

        _, xs = lax.scan(body, (jnp.zeros_like(b[0]), jnp.zeros_like(one)), (A, b))
        return xs


def _matvec(A, x):
    if A.ndim == x.ndim:
        return A * x
    # An elementwise product and a sum, as XLA fuses these into the loop. On small
    # states a call to a matrix product costs more than its arithmetic.
    return jnp.sum(A * x[None], axis=-1)


SequentialScan.__init__.__doc__ = """**Arguments:** None"""
