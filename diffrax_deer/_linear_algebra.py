"""Products of many small matrices, which may be given by their diagonals."""

from typing import TypeAlias

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float


# Either full matrices or the diagonals of diagonal ones.
Matrices: TypeAlias = Float[Array, "*batch size size"] | Float[Array, "*batch size"]

# Up to this size, products are elementwise ones and sums. GPUs spend most of a small
# matrix product on what makes a large one fast.
_SMALL = 8


def matmul(
    A: Float[Array, "... i j"], B: Float[Array, "... j k"], small: int = _SMALL
) -> Array:
    def product(A, B):
        return jnp.matmul(A, B, precision=lax.Precision.HIGHEST)

    def sum_of_products(A, B):
        return jnp.sum(A[..., None] * B[..., None, :, :], axis=-2)

    if A.shape[-1] <= small:
        return lax.platform_dependent(A, B, cpu=product, default=sum_of_products)
    else:
        return product(A, B)


def matvec(A: Matrices, x: Float[Array, "*batch size"]) -> Array:
    if A.ndim == x.ndim:
        return A * x
    elif A.shape[-1] <= _SMALL:
        # XLA fuses this into what surrounds it. On small states a call to a library
        # costs more than its arithmetic.
        return jnp.sum(A * x[..., None, :], axis=-1)
    else:
        return jnp.matmul(A, x[..., None], precision=lax.Precision.HIGHEST)[..., 0]


def transpose(A: Matrices, x: Float[Array, "*batch size"]) -> Matrices:
    """Of the matrices that act on vectors like `x`."""
    return A if A.ndim == x.ndim else jnp.swapaxes(A, -1, -2)
