import jax
import jax.lax as lax
import jax.numpy as jnp
from equinox import AbstractVar
from jaxtyping import Array, Bool, Float

from .._custom_types import RealScalarLike
from .._linear_algebra import blockwise, matmul, Matrices, matvec
from .._scan import AbstractScan
from .._window import up_to_front
from .base import AbstractMethod


# If the damping is to be found automatically, then it is this many times the residual
# (relative to the size of the state, in the root mean square), ...
_PER_RESIDUAL = 0.1
# ...but between these bounds, below which there is none.
_MIN_DAMPING = 1e-7
_MAX_DAMPING = 1e-3


class AbstractDampedMethod(AbstractMethod):
    r"""Corrects by less than the linearisation says, where this would go far.

    ??? cite "Reference"

        The filter, in parallel:

        ```bibtex
        @article{sarkka2021temporal,
            author={S{\"a}rkk{\"a}, Simo and Garc{\'i}a-Fern{\'a}ndez, {\'A}ngel F.},
            title={Temporal Parallelization of Bayesian Smoothers},
            journal={IEEE Transactions on Automatic Control},
            volume={66},
            number={1},
            pages={299--306},
            year={2021},
        }
        ```
    """

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
        r_scaled = r / scale[None]
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

        def filtered(A, r, scale):
            if A.ndim == r.ndim:
                A = jnp.where(behind, 0, A)
            else:
                A = A / scale[..., None] * scale[..., None, :]
                A = jnp.where(behind[..., None], 0, A)
            gains = lax.cond(damping == 0, _no_gains, _gains, A, r, damping)
            multiply = matvec if A.ndim == r.ndim else matmul
            return scan(multiply(gains, A), matvec(gains, r))

        delta = blockwise(filtered, A, r_scaled, scale[None])
        return delta * scale[None], is_telling


# This is the Kalman filter for `x[n + 1] = A[n] x[n] + r[n] + v[n]`, with noise `v[n]`
# of unit covariance, given that all `x[n]` have been observed to be zero with a noise
# of covariance `1 / damping`. Its gains do not depend on `r`, and with these its means
# follow a linear recurrence again.


def _no_gains(A, r, damping):
    del damping
    eye = jnp.ones_like(r[:1]) if A.ndim == r.ndim else jnp.eye(r.shape[1])[None]
    return jnp.broadcast_to(eye.astype(A.dtype), A.shape)


def _gains(A, r, damping):
    """By which predictions are multiplied."""
    if A.ndim == r.ndim:
        one = jnp.ones_like(r[0])
        predict = lambda A, P: A * P * A + one
        gain = lambda P: 1 / (1 + damping * P)
        multiply = matvec
    else:
        one = jnp.eye(r.shape[1], dtype=A.dtype)
        predict = lambda A, P: matmul(matmul(A, P), jnp.swapaxes(A, -1, -2)) + one
        # Of one covariance, or of many.
        eye = lambda P: jnp.expand_dims(one, range(P.ndim - 2))
        gain = lambda P: jnp.linalg.inv(eye(P) + damping * P)
        multiply = matmul

    def sequential(A):
        def body(P, A):
            P = predict(A, P)
            G = gain(P)
            return multiply(G, P), G

        _, gains = lax.scan(body, jnp.zeros_like(one), A)
        return gains

    def parallel(A):
        # Nothing comes before the first value, which is zero.
        first = jnp.arange(len(A)).reshape(-1, *[1] * (A.ndim - 1)) == 0
        A = jnp.where(first, 0, A)
        keep, pull = 1 / (1 + damping), damping / (1 + damping)
        ones = jnp.broadcast_to(one[None], A.shape)
        J = A * A if A.ndim == r.ndim else matmul(jnp.swapaxes(A, -1, -2), A)
        elements = (keep * A, keep * ones, pull * J)
        _, P, _ = lax.associative_scan(_compose(one), elements)
        before = jnp.concatenate([jnp.zeros_like(P[:1]), P[:-1]])
        return gain(jax.vmap(predict)(A, before))

    return lax.platform_dependent(A, cpu=sequential, default=parallel)


def _compose(one):
    # The covariances of Lemma 8 of Särkkä & García-Fernández.
    def diagonal(first, second):
        (A1, C1, J1), (A2, C2, J2) = first, second
        D = 1 / (1 + C1 * J2)
        return A2 * D * A1, A2 * D * C1 * A2 + C2, A1 * D * J2 * A1 + J1

    def full(first, second):
        (A1, C1, J1), (A2, C2, J2) = first, second
        T = lambda X: jnp.swapaxes(X, -1, -2)
        eye = one[None]
        A2_D = T(jnp.linalg.solve(eye + matmul(J2, C1), T(A2)))
        A1T_D = T(jnp.linalg.solve(eye + matmul(C1, J2), A1))
        A = matmul(A2_D, A1)
        C = matmul(matmul(A2_D, C1), T(A2)) + C2
        return A, C, matmul(matmul(A1T_D, J2), A1) + J1

    return diagonal if one.ndim == 1 else full
