import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._linear_algebra import Matrices
from .._scan import AbstractScan
from .linearisation import AbstractIdleMethod


class Jacobi(AbstractIdleMethod):
    r"""Jacobi iteration: takes zero for the Jacobian of every substep. All substeps are
    made again from where the previous ones have just ended.

    Each iteration carries information by one substep only. So this converges quickly if
    the substeps hardly depend on the previous one, as those that are strongly damped.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{song2021accelerating,
            author={Song, Yang and Meng, Chenlin and Liao, Renjie and Ermon, Stefano},
            title={Accelerating Feedforward Computation via Parallel Nonlinear Equation
                   Solving},
            booktitle={International Conference on Machine Learning},
            year={2021},
        }
        ```
    """

    def correct(
        self,
        scan: AbstractScan,
        A: Matrices,
        r: Float[Array, "substeps size"],
        ys: Float[Array, "substeps size"],
    ) -> tuple[Float[Array, "substeps size"], Bool[Array, ""]]:
        del scan, A, ys
        return r, jnp.array(True)


Jacobi.__init__.__doc__ = """**Arguments:** None"""
