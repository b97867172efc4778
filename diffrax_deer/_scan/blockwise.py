from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from .._linear_algebra import blockwise, Matrices
from .base import AbstractScan
from .sharded import ShardedScan


def whole_scan(scan: AbstractScan, sharding: NamedSharding | None) -> AbstractScan:
    """The same, also of blocks, and of a time axis that is divided over devices."""
    if sharding is not None:
        scan = ShardedScan(scan, sharding)
    return BlockwiseScan(scan)


class BlockwiseScan(AbstractScan):
    """Any other scan, that of each block by itself if there are blocks. So none of the
    others has to know about these."""

    scan: AbstractScan

    def __call__(
        self, A: Matrices, b: Float[Array, "substeps size"], *, reverse: bool = False
    ) -> Float[Array, "substeps size"]:
        return blockwise(lambda A, b: self.scan(A, b, reverse=reverse), A, b)
