from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractSolver, AbstractTerm
from jaxtyping import Array, PyTree, Real

from .._checks import check_instance, check_positive_int
from .._state import DeerState
from .._step import OneStepMap
from ._coarse_grid import unless_constant_is_better
from .base import AbstractGuess
from .coarse import CoarseGuess


class ExtrapolationGuess(AbstractGuess):
    """Continues the previous window as a polynomial.

    This takes next to no time. It suits windows that are short compared with how
    quickly the solution changes. Where the polynomial goes astray, this falls back to
    the constant guess.
    """

    degree: int = eqx.field(default=3, static=True)
    first: AbstractGuess = CoarseGuess()

    def __check_init__(self):
        check_positive_int(self.degree, "ExtrapolationGuess(degree=...)")
        check_instance(self.first, AbstractGuess, "ExtrapolationGuess(first=...)")

    def __call__(
        self,
        solver: AbstractSolver,
        terms: PyTree[AbstractTerm],
        ts: Real[Array, " substeps_plus_1"],
        y0: PyTree[Array],
        args: PyTree[Any],
        previous: DeerState | None,
    ) -> PyTree[Array]:
        first = lambda: self.first(solver, terms, ts, y0, args, previous)
        if previous is None:
            return first()
        substeps = ts.shape[0] - 1
        degree = min(self.degree, substeps - 1)

        def extrapolate():
            # Lagrange interpolation between points that are spread over all of the
            # previous window. Relative to their distance, the new ones are close.
            index = (substeps - 1) * jnp.arange(degree + 1, dtype=jnp.int32)
            index = index // max(degree, 1)
            nodes = (index + 1) / substeps
            xs = 1 + (ts[1:] - previous.t1) / (previous.t1 - previous.t0)
            others = jnp.invert(jnp.eye(degree + 1, dtype=bool))
            factors = (xs[:, None, None] - nodes) / jnp.where(
                others, nodes[:, None] - nodes, 1
            )
            weights = jnp.prod(jnp.where(others, factors, 1), axis=-1)

            def one(ys):
                return jnp.tensordot(weights.astype(ys.dtype), ys[index], axes=1)

            step = OneStepMap(solver, terms, y0, args)
            ys = jtu.tree_map(one, previous.ys)
            ys = jax.vmap(step.ravel, axis_size=substeps)(ys)
            return unless_constant_is_better(ys, step, ts, step.ravel(y0))

        return lax.cond(previous.t1 == ts[0], extrapolate, first)


ExtrapolationGuess.__init__.__doc__ = """**Arguments:**

- `degree`: of the polynomial. A positive integer.
- `first`: the guess for windows before which there is none: the first one, those that
    follow a discontinuity, and those that [`diffrax_deer.DeerAdjoint`][] has merged
    from known steps.
"""
