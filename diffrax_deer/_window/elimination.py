from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
from jaxtyping import Array, Float

from .._linear_algebra import Matrices, matvec
from .base import AbstractElimination, Iterate
from .tableau import Tableau


class StageElimination(AbstractElimination):
    r"""Solves the linearised equations of the stages,

    $\delta Y_i = \delta y + \sum_j a_{ij} \delta k_j$ and
    $\delta k_i = J_i \delta Y_i + r_i$,

    of every substep by itself: stage by stage if the method is explicit or diagonally
    implicit, and all at once if it is not.
    """

    tableau: Tableau = eqx.field(static=True)
    J: Matrices
    # Of what has to be solved for implicit stages. `None` for those that are explicit.
    factors: Sequence[tuple[Array, Array] | Array | None]
    A: Matrices

    def __init__(self, tableau: Tableau, J: Matrices, size: int):
        self.tableau = tableau
        self.J = J
        if tableau.is_diagonally_implicit:
            self.factors = [self._stage_factor(i) for i in range(tableau.stages)]
        else:
            self.factors = [self._factor_all()]
        if self._is_diagonal:
            self.A = self._step(jnp.ones_like(J[:, 0, 0]))
        else:
            unit = lambda e: self._step(jnp.broadcast_to(e, J.shape[:1] + e.shape))
            self.A = jax.vmap(unit, out_axes=-1)(jnp.eye(size, dtype=J.dtype))

    def condense(self, r: Iterate) -> Float[Array, "substeps size"]:
        return r.ys + self._increment(self.substitute(jnp.zeros_like(r.ys), r))

    def substitute(
        self, starts: Float[Array, "substeps size"], r: Iterate
    ) -> Float[Array, "substeps parts stages size"]:
        return self._solve(starts, r.ks)

    @property
    def _is_diagonal(self):
        return self.J.ndim == 4

    def _step(self, starts):
        # What a correction at the start becomes at the end.
        return starts + self._increment(self._solve(starts, None))

    def _increment(self, ks):
        return weighted(self.tableau.b, ks)

    def _solve(self, starts, r):
        if self.tableau.is_diagonally_implicit:
            dYs, dks = [], []
            for i in range(self.tableau.stages):
                dY = self._stage(i, starts, dks, r)
                dk = matvec(self.J[:, :, i], jnp.expand_dims(dY, 1))
                dks.append(dk if r is None else dk + r[:, :, i])
                dYs.append(dY)
            return jnp.stack(dks, axis=2)
        else:
            return self._all_stages(starts, r)

    def _stage(self, i, starts, dks, r):
        dY = starts
        for part, A in enumerate(self.tableau.A):
            for j in range(i):
                if A[i, j] != 0:
                    dY = dY + float(A[i, j]) * dks[j][:, part]
            if A[i, i] != 0 and r is not None:
                dY = dY + float(A[i, i]) * r[:, part, i]
        return _solve_with(self.factors[i], dY)

    def _stage_factor(self, i):
        diagonal = self.tableau.A[:, i, i]
        if not diagonal.any():
            return None
        J = self.J[:, :, i]
        terms = [float(a) * J[:, part] for part, a in enumerate(diagonal)]
        sum_J = jnp.asarray(sum(terms))
        return 1 - sum_J if self._is_diagonal else _factor(-sum_J)

    def _factor_all(self):
        # Of methods that are not diagonally implicit there is only ever one part.
        [A] = self.tableau.A
        J = self.J[:, 0]
        if self._is_diagonal:
            # A system between the stages for each of the components.
            A = jnp.asarray(A, J.dtype)[None, None]
            return _factor(-A * jnp.swapaxes(J, -1, -2)[:, :, None])
        A = jnp.asarray(A, J.dtype)[None, :, None, :, None]
        J = jnp.moveaxis(J, 1, 2)[:, None]
        length = J.shape[2] * J.shape[3]
        return _factor((-A * J).reshape(len(J), length, length))

    def _all_stages(self, starts, r):
        shape = (*self.J.shape[:1], *self.J.shape[2:4])
        dY = jnp.broadcast_to(starts[:, None], shape)
        if r is not None:
            dY = dY + weighted(self.tableau.A, r)
        [factor] = self.factors
        if self._is_diagonal:
            dY = _solve_with(factor, jnp.swapaxes(dY, -1, -2))
            dY = jnp.swapaxes(dY, -1, -2)
        else:
            dY = _solve_with(factor, dY.reshape(len(dY), -1)).reshape(shape)
        dk = matvec(self.J, dY[:, None])
        return dk if r is None else dk + r


def weighted(
    weights: np.ndarray, ks: Float[Array, "substeps parts stages size"]
) -> Array:
    """A sum over parts and stages, the last axes of `weights`, or several of them."""
    *several, parts, stages = np.moveaxis(weights, 0, -2).shape
    weights = np.moveaxis(weights, 0, -2).reshape(1, *several, parts, stages, 1)
    ks = jnp.expand_dims(ks, range(1, 1 + len(several)))
    return jnp.sum(jnp.asarray(weights, ks.dtype) * ks, axis=(-3, -2))


def _factor(X):
    """Of `1 + X`."""
    eye = jnp.eye(X.shape[-1], dtype=X.dtype)
    return jsp.linalg.lu_factor(X + jnp.expand_dims(eye, range(X.ndim - 2)))


def _solve_with(factor, x):
    if factor is None:
        return x
    elif isinstance(factor, tuple):
        return jsp.linalg.lu_solve(factor, x[..., None])[..., 0]
    else:
        return x / factor
