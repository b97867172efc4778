from typing import Literal

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
from equinox import AbstractVar
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._checks import check_damping, check_jacobian, check_positive_int
from .._custom_types import RealScalarLike
from .._scan import AbstractScan, Matrices
from .._window import AbstractWindow, up_to_front
from ._linearise import diagonal_jacobians, full_jacobians
from .base import AbstractMethod


# If the damping is to be found automatically, then it is this many times the residual
# (relative to the size of the state, in the root mean square), ...
_PER_RESIDUAL = 0.1
# ...but between these bounds, below which there is none.
_MIN_DAMPING = 1e-7
_MAX_DAMPING = 1e-3


class AbstractDampedMethod(AbstractMethod):
    """Corrects by less than the linearisation says, where this would go far."""

    damping: AbstractVar[RealScalarLike | None]

    def correct(
        self,
        scan: AbstractScan,
        A: Matrices,
        r: Float[Array, "substeps size"],
        ys: Float[Array, "substeps size"],
    ) -> tuple[Float[Array, "substeps size"], Bool[Array, ""]]:
        # Measure each component by how large it is.
        scale = jnp.max(jnp.abs(ys), axis=0)
        scale = jnp.where(scale > 0, scale, 1)
        r_scaled = r / scale
        if self.damping is None:
            # In proportion to the residual, as then it vanishes quickly enough for
            # Newton's method to remain quadratic. (Yamashita & Fukushima, On the rate
            # of convergence of the Levenberg-Marquardt method, 2001.)
            residual = jnp.sqrt(jnp.mean(r_scaled**2))
            damping = jnp.minimum(_PER_RESIDUAL * residual, _MAX_DAMPING)
            damping = jnp.where(damping < _MIN_DAMPING, 0, damping)
            # What is small because of the damping says nothing about the distance.
            is_telling = damping == 0
        else:
            damping = jnp.asarray(self.damping, r.dtype)
            is_telling = jnp.array(True)

        # Where there is nothing to correct, the filter has nothing to be unsure about.
        behind = up_to_front(jnp.any(r != 0, axis=-1))[:, None]
        if A.ndim == r.ndim:
            A = jnp.where(behind, 0, A)
        else:
            A = jnp.where(behind[..., None], 0, A / scale[:, None] * scale)
        delta = lax.cond(
            damping == 0,
            lambda: scan(A, r_scaled),
            lambda: scan.damped(A, r_scaled, damping),
        )
        return delta * scale, is_telling


class ELK(AbstractDampedMethod):
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
    jacobian: Literal["linear_ode", "exact"] = eqx.field(
        default="linear_ode", static=True
    )

    def __check_init__(self):
        check_damping(self.damping, "ELK(damping=...)")
        check_jacobian(self.jacobian, "ELK(jacobian=...)")

    def linearise(
        self, window: AbstractWindow, ys: Float[Array, "substeps size"]
    ) -> Float[Array, "substeps size size"]:
        return full_jacobians(window, ys, exact=self.jacobian == "exact")


ELK.__init__.__doc__ = """**Arguments:**

- `damping`: how much not to trust the linearisation. Not negative. Relative to the size
    of each component of the state: at 1, a correction is halved in every substep that
    does not amplify it. Good values are below 0.01. If `None` then it is chosen in
    proportion to the residual, and vanishes close to the solution.
- `jacobian`: how to linearise a substep, as for [`diffrax_deer.DEER`][].
"""


class QuasiELK(AbstractDampedMethod):
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
    jacobian: Literal["linear_ode", "exact"] = eqx.field(
        default="linear_ode", static=True
    )
    samples: int | None = eqx.field(default=None, static=True)
    key: PRNGKeyArray | None = None

    def __check_init__(self):
        check_damping(self.damping, "QuasiELK(damping=...)")
        check_jacobian(self.jacobian, "QuasiELK(jacobian=...)")
        if self.samples is not None:
            check_positive_int(self.samples, "QuasiELK(samples=...)")

    def linearise(
        self, window: AbstractWindow, ys: Float[Array, "substeps size"]
    ) -> Float[Array, "substeps size"]:
        return diagonal_jacobians(
            window,
            ys,
            exact=self.jacobian == "exact",
            samples=self.samples,
            key=jr.key(0) if self.key is None else self.key,
        )


QuasiELK.__init__.__doc__ = """**Arguments:**

- `damping`: as for [`diffrax_deer.ELK`][].
- `jacobian`, `samples`, `key`: as for [`diffrax_deer.QuasiDEER`][].
"""
