from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from equinox import AbstractVar
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._checks import check_damping, check_jacobian, check_positive_int
from .._custom_types import RealScalarLike
from .._scan import AbstractScan, Matrices
from .._step import Window
from ._linearise import diagonal_jacobians, full_jacobians
from .base import AbstractMethod


# Begin here, if the damping is to be found automatically, ...
_FIRST_DAMPING = 0.1
# ...lower or raise it by this factor whenever the residual shrinks or grows, ...
_FACTOR = 3.0
# ...between these bounds, and leave it out once it does not matter.
_MIN_DAMPING = 1e-6
_MAX_DAMPING = 1e6
_NO_DAMPING = 1e-6


class DampingState(eqx.Module):
    """The damping of the next iteration, and the size of the last residual."""

    damping: Float[Array, ""]
    residual: Float[Array, ""]


class AbstractDampedMethod(AbstractMethod):
    """Corrects by less than the linearisation says, where this would go far."""

    damping: AbstractVar[RealScalarLike | None]

    def init(self) -> DampingState:
        damping = _FIRST_DAMPING if self.damping is None else self.damping
        return DampingState(
            jnp.asarray(damping, jnp.result_type(float)),
            jnp.asarray(jnp.inf, jnp.result_type(float)),
        )

    def correct(
        self,
        scan: AbstractScan,
        A: Matrices,
        r: Float[Array, "substeps size"],
        ys: Float[Array, "substeps size"],
        state: DampingState,
    ) -> tuple[Float[Array, "substeps size"], Bool[Array, ""], DampingState]:
        # Measure each component by how large it is.
        scale = jnp.max(jnp.abs(ys), axis=0)
        scale = jnp.where(scale > 0, scale, 1)
        r_scaled = r / scale
        residual = jnp.sqrt(jnp.mean(r_scaled**2)).astype(state.residual.dtype)
        if self.damping is None:
            factor = jnp.where(residual < state.residual, 1 / _FACTOR, _FACTOR)
            factor = jnp.where(jnp.isinf(state.residual), 1, factor)
            damping = jnp.clip(state.damping * factor, _MIN_DAMPING, _MAX_DAMPING)
            # In proportion to the residual, as then it vanishes quickly enough for
            # Newton's method to remain quadratic.
            effective = damping * residual
            effective = jnp.where(effective < _NO_DAMPING, 0, effective)
            is_final = effective == 0
        else:
            effective = damping = state.damping
            is_final = jnp.array(True)
        effective = effective.astype(r.dtype)

        # The first residual that is not zero has no error to be carried away from.
        n = jnp.arange(len(r), dtype=jnp.int32)
        front = jnp.argmax(jnp.any(r != 0, axis=-1)).astype(jnp.int32)
        behind = n <= front
        if A.ndim == r.ndim:
            A = jnp.where(behind[:, None], 0, A)
        else:
            A = A / scale[:, None] * scale
            A = jnp.where(behind[:, None, None], 0, A)
        delta = scan.damped(A, r_scaled, effective) * scale
        delta = jnp.where(behind[:, None], r, delta)
        return delta, is_final, DampingState(damping, residual)


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
        self, window: Window, ys: Float[Array, "substeps size"]
    ) -> Float[Array, "substeps size size"]:
        return full_jacobians(window, ys, exact=self.jacobian == "exact")


ELK.__init__.__doc__ = """**Arguments:**

- `damping`: how much not to trust the linearisation. Not negative. Relative to the size
    of each component of the state: the correction is halved at 1, if the substep does
    not amplify it. If `None` then it is lowered whenever the residuals have become
    smaller, and raised when they have not.
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
        self, window: Window, ys: Float[Array, "substeps size"]
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
