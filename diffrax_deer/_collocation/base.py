import abc
import dataclasses
from typing import Any, ClassVar

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from diffrax import (
    AbstractAdaptiveSolver,
    AbstractImplicitSolver,
    AbstractTerm,
    RESULTS,
)
from equinox import AbstractVar
from jaxtyping import Array, ArrayLike

from .._custom_types import (
    Args,
    BoolScalarLike,
    DenseInfo,
    PyTree,
    RealScalarLike,
    RootFinder,
    Stages,
    Terms,
    VF,
    Y,
)
from .._interpolation import AbstractInterpolation


class AbstractCollocation(AbstractImplicitSolver[None], AbstractAdaptiveSolver[None]):
    """Abstract base class for collocation methods: fully implicit Runge--Kutta methods,
    whose solution over a step is the polynomial that satisfies the differential
    equation at certain nodes.

    Used by itself, all stages of a step are found by the `root_finder`.
    [`diffrax_deer.DeerSolver`][] solves for those of all its substeps at once, which
    takes about as long as if the method was explicit.
    """

    stages: AbstractVar[int]
    root_finder: AbstractVar[RootFinder]
    root_find_max_steps: AbstractVar[int]

    term_structure: ClassVar[Any] = AbstractTerm

    @property
    def interpolation_cls(self) -> Any:  # pyright: ignore
        return _InterpolationFactory(tuple(self.nodes(self.stages).tolist()))

    @staticmethod
    @abc.abstractmethod
    def nodes(stages: int) -> np.ndarray:
        """The nodes, in `[0, 1]`."""

    @classmethod
    def coefficients(
        cls, stages: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The Butcher tableau `A`, `b`, `c`, and the weights of an error estimate."""
        c = cls.nodes(stages)
        A = np.stack([_weights(c, end) for end in c])
        b = _weights(c, 1.0)
        # The difference to the quadrature without the first node.
        b_error = b - np.concatenate([[0.0], _weights(c[1:], 1.0)])
        return A, b, c, b_error

    def error_order(self, terms: Terms) -> Any:
        del terms
        return _NoErrorEstimate(type(self)) if self.stages == 1 else self.stages

    def init(
        self,
        terms: AbstractTerm[Any, Any],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> None:
        del terms, t0, t1, y0, args

    def step(
        self,
        terms: AbstractTerm[Any, Any],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: None,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y, DenseInfo, None, RESULTS]:
        del solver_state, made_jump
        A, b, c, b_error = self.coefficients(self.stages)
        control = terms.contr(t0, t1)
        times = t0 + jnp.asarray(c, jnp.result_type(t0)) * (t1 - t0)

        def increments(k, args):
            def one(time, weights):
                y = jtu.tree_map(lambda y, k: y + _weighted(weights, k), y0, k)
                return terms.vf_prod(time, y, args, control)

            rows = [one(t, row) for t, row in zip(times, A)]
            return jtu.tree_map(lambda *x: jnp.stack(x), *rows)

        zeros = jtu.tree_map(
            lambda y: jnp.zeros((self.stages, *jnp.shape(y)), jnp.result_type(y)), y0
        )
        solution = optx.root_find(
            lambda k, args: jtu.tree_map(jnp.subtract, increments(k, args), k),
            self.root_finder,
            zeros,
            args,
            throw=False,
            max_steps=self.root_find_max_steps,
        )
        k = solution.value
        y1 = jtu.tree_map(lambda y, k: y + _weighted(b, k), y0, k)
        result = RESULTS.promote(solution.result)
        okay = result == RESULTS.successful
        if self.stages == 1:
            # Which is never a good one.
            okay = False
        y_error = jtu.tree_map(
            lambda k: jnp.where(okay, _weighted(b_error, k), jnp.inf), k
        )
        return y1, y_error, dict(y0=y0, y1=y1, k=k), None, result

    def func(
        self, terms: AbstractTerm[Any, Any], t0: RealScalarLike, y0: Y, args: Args
    ) -> VF:
        return terms.vf(t0, y0, args)


class _NoErrorEstimate:
    """In the place of the order of an error estimate. Only adaptive step size
    controllers make use of that: they divide by it."""

    def __init__(self, cls: type):
        self.name = cls.__name__

    def __rtruediv__(self, other):
        raise ValueError(
            f"`{self.name}(stages=1)` has no error estimate, as an adaptive step size "
            f"controller needs. Use `{self.name}(stages=2)` or more stages, or "
            "`diffrax.ConstantStepSize()`. (Inside of a `DeerSolver` an even number of "
            "`substeps` will do.)"
        )


def _weighted(weights: ArrayLike, k: Array) -> Array:
    """The sum of the stages with these weights, as precise as it can be."""
    weights = jnp.asarray(weights, k.dtype)
    return jnp.tensordot(weights, k, axes=1, precision=lax.Precision.HIGHEST)


def _weights(nodes: np.ndarray, end: float) -> np.ndarray:
    """Of the interpolatory quadrature over `[0, end]`."""
    # By Gauss--Legendre quadrature of the Lagrange polynomials, which is exact.
    x, w = np.polynomial.legendre.leggauss(max(len(nodes), 1))
    x, w = end * (x + 1) / 2, end * w / 2
    others = ~np.eye(len(nodes), dtype=bool)
    factors = (x[:, None, None] - nodes) / np.where(others, nodes[:, None] - nodes, 1)
    return w @ np.prod(np.where(others, factors, 1), axis=-1)


class CollocationInterpolation(AbstractInterpolation):
    """The polynomial itself."""

    t0: RealScalarLike
    t1: RealScalarLike
    y0: Y
    k: Stages
    nodes: tuple[float, ...] = eqx.field(static=True)

    def at(self, t: RealScalarLike, left: bool) -> PyTree[Array]:
        del left
        x = jnp.asarray((t - self.t0) / (self.t1 - self.t0))
        # The integrals of the Lagrange polynomials, as polynomials themselves.
        stages = len(self.nodes)
        powers = np.arange(1, stages + 1)
        inverse = np.linalg.inv(np.vander(self.nodes, increasing=True))
        coefficients = inverse / powers[:, None]

        def one(y0, k):
            weights = x.astype(k.dtype) ** jnp.asarray(powers, k.dtype)
            return y0 + _weighted(_weighted(coefficients.T, weights), k)

        return jtu.tree_map(one, self.y0, self.k)


# A dataclass rather than a closure, as Diffrax stores this as static information, which
# JAX then compares.
@dataclasses.dataclass(frozen=True)
class _InterpolationFactory:
    nodes: tuple[float, ...]

    def __call__(self, *, t0, t1, y0, y1, k) -> CollocationInterpolation:
        del y1  # It follows.
        return CollocationInterpolation(t0, t1, y0, k, self.nodes)
