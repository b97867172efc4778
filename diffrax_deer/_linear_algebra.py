"""Products of many small matrices, which may be given by their diagonals or blocks."""

import functools as ft
from collections.abc import Callable, Iterable
from typing import TypeAlias

import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float


# Either full matrices, or the diagonals of diagonal ones, or the blocks of those that
# act on what is at the same place in each of `block` parts of a vector.
Matrices: TypeAlias = (
    Float[Array, "*batch size size"]
    | Float[Array, "*batch size"]
    | Float[Array, "*batch block block blocks"]
)

# Up to this size, products are elementwise ones and sums. GPUs spend most of a small
# matrix product on what makes a large one fast.
_SMALL = 8


def matmul(
    A: Float[Array, "... i j"], B: Float[Array, "... j k"], small: int = _SMALL
) -> Array:
    if _are_sums(A, small):
        return _sum(A[..., k, None] * B[..., None, k, :] for k in range(A.shape[-1]))
    return jnp.matmul(A, B, precision=lax.Precision.HIGHEST)


def matvec(A: Matrices, x: Float[Array, "*batch size"]) -> Array:
    if A.ndim == x.ndim:
        return A * x
    elif has_blocks(A, x):
        return blockwise(matvec, A, x)
    elif _are_sums(A, _SMALL):
        return _sum(A[..., k] * x[..., k, None] for k in range(A.shape[-1]))
    elif A.shape[-1] <= _SMALL:
        # XLA fuses this into what surrounds it. On small states a call to a library
        # costs more than its arithmetic.
        return jnp.sum(A * x[..., None, :], axis=-1)
    else:
        return jnp.matmul(A, x[..., None], precision=lax.Precision.HIGHEST)[..., 0]


def _are_sums(A, small):
    # Term by term: then they are elementwise, and on a GPU part of whatever kernel they
    # occur in, whereas a kernel ends with every reduction. On a CPU that is slower.
    return 0 < A.shape[-1] <= small and jax.default_backend() != "cpu"


def _sum(terms: Iterable[Array]) -> Array:
    return ft.reduce(jnp.add, terms)


def transpose(A: Matrices, x: Float[Array, "*batch size"]) -> Matrices:
    """Of the matrices that act on vectors like `x`."""
    if A.ndim == x.ndim:
        return A
    return jnp.swapaxes(A, *((-3, -2) if has_blocks(A, x) else (-2, -1)))


def has_blocks(A: Matrices, x: Float[Array, "*batch size"]) -> bool:
    return A.ndim == x.ndim + 2


def blockwise(fn: Callable[..., Array], A: Matrices, *xs: Array) -> Array:
    """`fn(A, *xs)`, of vectors `xs` and to a vector. If there are blocks, then for each
    of them by itself, as if it was a full matrix."""
    if not has_blocks(A, xs[0]):
        return fn(A, *xs)
    xs = tuple(split(x, A.shape[-1]) for x in xs)
    return join(jax.vmap(fn, in_axes=-1, out_axes=-1)(A, *xs))


def split(x: Float[Array, "*batch size"], blocks: int) -> Array:
    """The part of a vector that each block acts on."""
    return x.reshape(*x.shape[:-1], -1, blocks)


def join(x: Float[Array, "*batch block blocks"]) -> Array:
    """The inverse."""
    return x.reshape(*x.shape[:-2], -1)
