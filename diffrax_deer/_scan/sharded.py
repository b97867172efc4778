import jax.lax as lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from .._linear_algebra import matmul, Matrices, matvec
from .._time_axis import axis_names, num_parts, on_each
from .associative import clip
from .base import AbstractScan
from .sequential import SequentialScan


class ShardedScan(AbstractScan):
    """Any other scan, on each of several devices by itself. What each of them has of a
    recurrence amounts to one affine map, and these are all that they exchange."""

    scan: AbstractScan
    sharding: NamedSharding

    def __call__(
        self, A: Matrices, b: Float[Array, "substeps size"], *, reverse: bool = False
    ) -> Float[Array, "substeps size"]:
        first, last = (-1, 0) if reverse else (0, -1)
        names, number = axis_names(self.sharding), num_parts(self.sharding)

        def local(A, b):
            ends = _product(A, reverse), self.scan(A, b, reverse=reverse)[last]
            of_all = lax.all_gather(ends, names)
            starts = SequentialScan()(*of_all, reverse=reverse)
            # From where the device before has ended.
            index = lax.axis_index(names)
            neighbour = index + 1 if reverse else index - 1
            is_first = (neighbour < 0) | (neighbour >= number)
            start = jnp.where(is_first, 0, starts[jnp.clip(neighbour, 0, number - 1)])
            b = b.at[first].add(matvec(A[first], start))
            return self.scan(A, b, reverse=reverse)

        return on_each(local, self.sharding)(A, b)


def _product(A, reverse):
    """Of all matrices."""
    is_diagonal = A.ndim == 2
    multiply = jnp.multiply if is_diagonal else matmul
    clipped = lambda A: clip(A, 1 if is_diagonal else A.shape[-1])
    A = clipped(A)
    # In pairs, and these again.
    while len(A) > 1:
        pairs = len(A) // 2
        first, second, rest = A[: 2 * pairs : 2], A[1 : 2 * pairs : 2], A[2 * pairs :]
        if reverse:
            first, second = second, first
        A = jnp.concatenate([clipped(multiply(second, first)), rest])
    return A[0]
