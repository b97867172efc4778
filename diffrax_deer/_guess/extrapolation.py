import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._checks import check_instance, check_positive_int
from .._custom_types import IntScalarLike
from .._state import DeerState
from .._window import Discretisation, Iterate
from .auto import AutoGuess
from .base import AbstractGuess, Solve
from .coarse_grid import unless_constant_is_better


class ExtrapolationGuess(AbstractGuess):
    """Continues the previous window as a polynomial.

    This takes next to no time. It suits windows that are short compared with how
    quickly the solution changes. Where the polynomial goes astray, this falls back to
    the constant guess.
    """

    degree: int = eqx.field(default=3, static=True)
    first: AbstractGuess = AutoGuess()

    def __check_init__(self) -> None:
        check_positive_int(self.degree, "ExtrapolationGuess(degree=...)")
        check_instance(self.first, AbstractGuess, "ExtrapolationGuess(first=...)")

    def __call__(
        self, problem: Discretisation, previous: DeerState | None, solve: Solve
    ) -> tuple[Iterate, IntScalarLike]:
        def first():
            guess, span = self.first(problem, previous, solve)
            return guess, jnp.asarray(span, jnp.int32)

        if previous is None:
            return first()
        substeps = problem.substeps
        degree = min(self.degree, substeps - 1)

        def extrapolate():
            # Lagrange interpolation between points that are spread over all of the
            # previous window. Relative to their distance, the new ones are close.
            index = (substeps - 1) * jnp.arange(degree + 1, dtype=jnp.int32)
            index = index // max(degree, 1)
            if previous.fractions is None:
                nodes = (index + 1).astype(problem.t1s.dtype) / substeps
            else:
                nodes = previous.fractions[index + 1]
            xs = 1 + (problem.t1s - previous.t1) / (previous.t1 - previous.t0)
            others = jnp.invert(jnp.eye(degree + 1, dtype=bool))
            distances = jnp.where(others, nodes[:, None] - nodes[None], 1)[None]
            factors = (xs[:, None, None] - nodes[None, None]) / distances
            weights = jnp.prod(jnp.where(others[None], factors, 1), axis=-1)

            def one(ys):
                return jnp.tensordot(
                    weights.astype(ys.dtype),
                    ys[index],
                    axes=1,
                    precision=lax.Precision.HIGHEST,
                )

            ys = problem.ravel_all(jtu.tree_map(one, previous.ys))
            guess = unless_constant_is_better(problem, ys)
            return guess, jnp.array(1, jnp.int32)

        return lax.cond(previous.t1 == problem.t0s[0], extrapolate, first)


ExtrapolationGuess.__init__.__doc__ = """**Arguments:**

- `degree`: of the polynomial. A positive integer.
- `first`: the guess for windows before which there is none: the first one, those that
    follow a discontinuity, and those that [`diffrax_deer.DeerAdjoint`][] has merged
    from known steps.
"""
