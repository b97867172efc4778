import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from .._linear_algebra import join, matmul, Matrices, matvec, split
from .base import AbstractElimination, Iterate
from .tableau import Tableau


# Up to this size, the equations of all stages of a substep are solved as a whole, which
# takes memory for the square of it. Above, stage by stage, and this many times more.
_DENSE = 64
_REFINEMENTS = 2


class StageElimination(AbstractElimination):
    r"""Solves the linearised equations of the stages,

    $\delta Y_i = \delta y + \sum_j a_{ij} \delta k_j$ and
    $\delta k_i = J_i \delta Y_i + r_i$,

    of every substep by itself: stage by stage if the method is explicit or diagonally
    implicit, and all at once if it is not.
    """

    tableau: Tableau = eqx.field(static=True)
    J: Matrices
    # Of what has to be solved for implicit stages, each as the matrices to multiply
    # with, one after the other. Of stages that are explicit there are none.
    inverses: Sequence[tuple[Array, ...]]
    # The same as `A`, for the stages. With these, corrections at the starts need not go
    # from stage to stage, each of which takes two kernels on a GPU.
    A_stages: Array
    A: Matrices
    is_exact: bool = eqx.field(static=True)

    def __init__(self, tableau: Tableau, J: Matrices):
        self.tableau = tableau
        is_same = J.shape[2] < tableau.stages
        self.J = jnp.broadcast_to(J, (*J.shape[:2], tableau.stages, *J.shape[3:]))
        self.is_exact = True
        if tableau.is_diagonally_implicit:
            self.inverses = self._of_stages(is_same)
        elif self._is_diagonal or self._as_a_whole:
            self.inverses = [self._of_all_stages()]
        else:
            self.is_exact = is_same
            self.inverses = [self._of_modes()]
        if self._is_diagonal:
            self.A_stages, self.A = self._step(jnp.ones_like(J[:, 0, 0]))
        else:
            unit = lambda e: self._step(jnp.broadcast_to(e, J.shape[:1] + e.shape))
            units = jnp.eye(J.shape[-1], dtype=J.dtype)
            self.A_stages, self.A = jax.vmap(unit, out_axes=-1)(units)

    def condense(self, r: Iterate) -> Iterate:
        ks = self._solve(jnp.zeros_like(r.ys), r.ks)
        return Iterate(r.ys + weighted(self.tableau.b, ks), ks)

    def substitute(
        self, starts: Float[Array, "substeps size"], condensed: Iterate
    ) -> Float[Array, "substeps parts stages size"]:
        ks = condensed.ks
        if self._is_diagonal:
            return self.A_stages * starts[:, None, None] + ks
        rows = self.A_stages.reshape(len(ks), math.prod(ks.shape[1:]), ks.shape[-1])
        return matvec(rows, starts).reshape(ks.shape) + ks

    @property
    def _is_diagonal(self):
        return self.J.ndim == 4

    @property
    def _as_a_whole(self):
        return self.tableau.stages * self.J.shape[-1] <= _DENSE

    def _step(self, starts):
        # What a correction at the start becomes in the stages, and at the end.
        dks = self._solve(starts, None)
        return dks, starts + weighted(self.tableau.b, dks)

    def _solve(self, starts, r):
        if self.tableau.is_diagonally_implicit:
            dks = []
            for i in range(self.tableau.stages):
                dY = self._stage(i, starts, dks, r)
                dk = matvec(self.J[:, :, i], jnp.expand_dims(dY, 1))
                dks.append(dk if r is None else dk + r[:, :, i])
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
        return _apply(self.inverses[i], dY)

    def _of_stages(self, is_same):
        diagonals = np.diagonal(self.tableau.A, axis1=1, axis2=2)
        implicit = np.flatnonzero(diagonals.any(axis=0))
        if len(implicit) == 0:
            return [()] * self.tableau.stages
        weights, which = diagonals[:, implicit], range(len(implicit))
        if is_same:
            # One inverse for each coefficient. Most methods have only one.
            weights, which = np.unique(weights, axis=1, return_inverse=True)
            which = which.ravel()
        # (If they are the same then it does not matter of which stages these are.)
        J = self.J[:, :, implicit[: weights.shape[1]]]
        weights = jnp.asarray(weights, J.dtype)
        weights = jnp.expand_dims(weights, (0, *range(3, J.ndim)))
        X = -jnp.sum(weights * J, axis=1)
        inverse = 1 / (1 + X) if self._is_diagonal else _inverse(X)
        inverses: list[tuple[Array, ...]] = [()] * self.tableau.stages
        for i, k in zip(implicit, which):
            inverses[i] = (inverse[:, k],)
        return inverses

    def _of_all_stages(self):
        # Of methods that are not diagonally implicit there is only ever one part.
        [A] = self.tableau.A
        J = self.J[:, 0]
        if self._is_diagonal:
            # A system between the stages for each of the components.
            A = jnp.asarray(A, J.dtype)[None, None]
            return _inverse_factors(-A * jnp.swapaxes(J, -1, -2)[:, :, None])
        A = jnp.asarray(A, J.dtype)[None, :, None, :, None]
        J = jnp.moveaxis(J, 1, 2)[:, None]
        length = J.shape[2] * J.shape[3]
        return _inverse_factors((-A * J).reshape(len(J), length, length))

    def _modes(self):
        # Of the coefficients: `A = T diag(eigenvalues) T^-1`. Of complex conjugates one
        # will do, counted twice.
        eigenvalues, T = np.linalg.eig(self.tableau.A[0])
        imag = np.imag(eigenvalues)
        kept = np.flatnonzero(imag >= 0)
        twice = np.where(imag[kept] > 0, 2, 1)
        return eigenvalues[kept], np.linalg.inv(T)[kept], (twice * T[:, kept]).T

    def _of_modes(self):
        # As if the Jacobians of all stages were the same, so that stages decouple into
        # systems of the size of the state. (Hairer & Wanner, Solving Ordinary
        # Differential Equations II, section IV.8.) Complex ones are made of real parts.
        eigenvalues, _, _ = self._modes()
        J = jnp.mean(self.J[:, 0], axis=1)[:, None]
        part = lambda x: jnp.asarray(x, J.dtype)[None, :, None, None] * J
        real, imag = part(np.real(eigenvalues)), part(np.imag(eigenvalues))
        return (_inverse(jnp.block([[-real, imag], [-imag, -real]])),)

    def _solve_modes(self, rhs):
        _, to_modes, from_modes = self._modes()
        [inverse] = self.inverses

        def transform(x):
            # With axes for modes and stages.
            return jnp.asarray(x, rhs.dtype)[None, :, :, None]

        def roughly(x):
            parts = (np.real(to_modes), np.imag(to_modes))
            modes = [jnp.sum(transform(T) * x[:, None], axis=2) for T in parts]
            modes = _apply(inverse, jnp.concatenate(modes, axis=-1))
            u, v = jnp.split(modes[:, :, None], 2, axis=-1)
            real, imag = np.real(from_modes), np.imag(from_modes)
            terms = transform(real) * u - transform(imag) * v
            return jnp.sum(terms, axis=1)

        # If the Jacobians are not the same then this has to be repeated.
        dY = roughly(rhs)
        for _ in range(0 if self.is_exact else _REFINEMENTS):
            dk = matvec(self.J, dY[:, None])
            dY = dY + roughly(rhs + weighted(self.tableau.A, dk) - dY)
        return dY

    def _all_stages(self, starts, r):
        shape = (*self.J.shape[:1], *self.J.shape[2:4])
        dY = jnp.broadcast_to(starts[:, None], shape)
        if r is not None:
            dY = dY + weighted(self.tableau.A, r)
        if self._is_diagonal:
            dY = _apply(self.inverses[0], jnp.swapaxes(dY, -1, -2))
            dY = jnp.swapaxes(dY, -1, -2)
        elif self._as_a_whole:
            dY = _apply(self.inverses[0], dY.reshape(len(dY), -1)).reshape(shape)
        else:
            dY = self._solve_modes(dY)
        dk = matvec(self.J, dY[:, None])
        return dk if r is None else dk + r


class BlockElimination(AbstractElimination):
    """The same for every block of the state by itself."""

    # With a last axis for these.
    each: StageElimination

    def __init__(self, tableau: Tableau, J: Matrices):
        eliminate = lambda J: StageElimination(tableau, J)
        self.each = eqx.filter_vmap(eliminate, in_axes=-1, out_axes=eqx.if_array(-1))(J)

    @property
    def A(self) -> Matrices:
        return self.each.A

    @property
    def is_exact(self) -> bool:
        return self.each.is_exact

    def condense(self, r: Iterate) -> Iterate:
        return self._of_each(lambda system, r: system.condense(r), r)

    def substitute(
        self, starts: Float[Array, "substeps size"], condensed: Iterate
    ) -> Float[Array, "substeps parts stages size"]:
        fn = lambda system, inputs: system.substitute(*inputs)
        return self._of_each(fn, (starts, condensed))

    def _of_each(self, fn, inputs):
        inputs = jtu.tree_map(lambda x: split(x, self.A.shape[-1]), inputs)
        fn = jax.vmap(fn, in_axes=-1, out_axes=-1)
        return jtu.tree_map(join, fn(self.each, inputs))


def weighted(
    weights: np.ndarray, ks: Float[Array, "substeps parts stages size"]
) -> Array:
    """A sum over parts and stages, the last axes of `weights`, or several of them."""
    substeps, parts, stages, size = ks.shape
    several = weights.shape[1:-1]
    rows = np.moveaxis(weights, 0, -2).reshape(math.prod(several), parts * stages)
    ks = ks.reshape(substeps, parts * stages, size)
    # However many stages: their weights are few.
    sums = matmul(jnp.asarray(rows[None], ks.dtype), ks, small=parts * stages)
    return sums.reshape(substeps, *several, size)


# Matrices are inverted, rather than factored for later solves, as everything else then
# are products. XLA would make many of the solves at once, and on a CPU JAX divides each
# over the threads of the pool that it waits in: with few of these, for ever.


def _inverse(X):
    """Of `1 + X`."""
    return jnp.linalg.inv(X + _eye_like(X))


def _inverse_factors(X):
    """The same as two triangular matrices, of which the first one is permuted. This is
    as accurate as a solve for all stages as a whole, of which some may be stiff, and
    some of their combinations not."""
    eye = _eye_like(X)
    LU, _, permutation = lax.linalg.lu(X + eye)
    L, U_T = jnp.tril(LU, -1) + eye, jnp.swapaxes(jnp.triu(LU), -1, -2)
    permuted = jax.nn.one_hot(permutation, eye.shape[-1], dtype=eye.dtype)
    # Both in one call.
    both = jnp.stack([L, U_T]), jnp.stack([permuted, eye])
    first, second_T = lax.linalg.triangular_solve(*both, left_side=True, lower=True)
    return first, jnp.swapaxes(second_T, -1, -2)


def _eye_like(X):
    return jnp.broadcast_to(jnp.eye(X.shape[-1], dtype=X.dtype), X.shape)


def _apply(inverse, x):
    for factor in inverse:
        x = matvec(factor, x)
    return x
