import jax.lax as lax
from jaxtyping import Array, Float

from .associative import AssociativeScan
from .base import AbstractScan, Matrices
from .sequential import SequentialScan


class AutoScan(AbstractScan):
    """Picks a scan by the platform that the computation is lowered for:
    [`diffrax_deer.SequentialScan`][] on a CPU, [`diffrax_deer.AssociativeScan`][]
    everywhere else.
    """

    def __call__(
        self, A: Matrices, b: Float[Array, "substeps size"], *, reverse: bool = False
    ) -> Float[Array, "substeps size"]:
        return lax.platform_dependent(
            A,
            b,
            cpu=lambda A, b: SequentialScan()(A, b, reverse=reverse),
            default=lambda A, b: AssociativeScan()(A, b, reverse=reverse),
        )

    def damped(
        self, A: Matrices, b: Float[Array, "substeps size"], damping: Float[Array, ""]
    ) -> Float[Array, "substeps size"]:
        return lax.platform_dependent(
            *(A, b, damping),
            cpu=SequentialScan().damped,
            default=AssociativeScan().damped,
        )


AutoScan.__init__.__doc__ = """**Arguments:** None"""
