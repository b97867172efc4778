import jax.lax as lax
from jaxtyping import Array, Float

from .._linear_algebra import Matrices
from .associative import AssociativeScan
from .base import AbstractScan
from .kernel import can_be_kernels, has_gpu, KernelScan
from .sequential import SequentialScan


class AutoScan(AbstractScan):
    """Picks a scan by the platform that the computation is lowered for:
    [`diffrax_deer.SequentialScan`][] on a CPU, [`diffrax_deer.KernelScan`][] on an
    Nvidia GPU (Ampere or later), [`diffrax_deer.AssociativeScan`][] everywhere else.
    (To export a computation for a GPU, from where JAX has none, this picks the last one
    as well.)
    """

    def __call__(
        self, A: Matrices, b: Float[Array, "substeps size"], *, reverse: bool = False
    ) -> Float[Array, "substeps size"]:
        scans: dict[str, AbstractScan] = dict(
            cpu=SequentialScan(), default=AssociativeScan()
        )
        if has_gpu() and can_be_kernels(A, b):
            scans["cuda"] = KernelScan()
        call = lambda scan: lambda A, b: scan(A, b, reverse=reverse)
        branches = {platform: call(scan) for platform, scan in scans.items()}
        return lax.platform_dependent(A, b, **branches)


AutoScan.__init__.__doc__ = """**Arguments:** None"""
