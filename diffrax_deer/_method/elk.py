import equinox as eqx
from jaxtyping import PRNGKeyArray

from .._checks import check_damping, check_optional_int, check_positive_int
from .._custom_types import RealScalarLike
from .damping import AbstractDampedMethod
from .linearisation import AbstractDiagonalMethod, AbstractFullMethod


class ELK(AbstractFullMethod, AbstractDampedMethod):
    r"""ELK: [`diffrax_deer.DEER`][] with a trust region, by a parallel Kalman filter.

    Where the linearised substeps amplify errors, DEER's corrections can be far too
    large to be trusted. Each iteration of ELK is one of the Levenberg--Marquardt
    method: it keeps the trajectory close to where it has been linearised. So it also
    converges over windows that are too long for DEER.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{gonzalez2024towards,
            author={Gonzalez, Xavier and Warrington, Andrew and Smith, Jimmy T.H. and
                    Linderman, Scott W.},
            title={Towards Scalable and Stable Parallelization of Nonlinear {RNN}s},
            booktitle={Advances in Neural Information Processing Systems},
            year={2024},
        }
        ```
    """

    damping: RealScalarLike | None = None

    def __check_init__(self) -> None:
        check_damping(self.damping, "ELK(damping=...)")


ELK.__init__.__doc__ = """**Arguments:**

- `damping`: how much not to trust the linearisation. Not negative. Relative to the size
    of each component of the state: at 1, a correction is halved in every substep that
    does not amplify it. Good values are below 0.01. If `None` then it is chosen in
    proportion to the residual, and vanishes close to the solution.
"""


class QuasiELK(AbstractDiagonalMethod, AbstractDampedMethod):
    r"""Quasi-ELK: [`diffrax_deer.QuasiDEER`][] with a trust region, as in
    [`diffrax_deer.ELK`][]. The Kalman filter is that of each component by itself.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{gonzalez2024towards,
            author={Gonzalez, Xavier and Warrington, Andrew and Smith, Jimmy T.H. and
                    Linderman, Scott W.},
            title={Towards Scalable and Stable Parallelization of Nonlinear {RNN}s},
            booktitle={Advances in Neural Information Processing Systems},
            year={2024},
        }
        ```
    """

    damping: RealScalarLike | None = None
    samples: int | None = eqx.field(default=None, static=True)
    key: PRNGKeyArray | None = None
    block: int = eqx.field(default=1, static=True)

    def __check_init__(self) -> None:
        check_damping(self.damping, "QuasiELK(damping=...)")
        check_optional_int(self.samples, "QuasiELK(samples=...)")
        check_positive_int(self.block, "QuasiELK(block=...)")


QuasiELK.__init__.__doc__ = """**Arguments:**

- `damping`: as for [`diffrax_deer.ELK`][].
- `samples`, `key`, `block`: as for [`diffrax_deer.QuasiDEER`][].
"""
