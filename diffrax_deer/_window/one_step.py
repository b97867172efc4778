from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import (
    AbstractRungeKutta,
    AbstractSolver,
    AbstractSRK,
    RESULTS,
)
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from .._custom_types import PyTree
from .._linear_algebra import Matrices
from .._tangents import with_zeros
from .base import AbstractElimination, AbstractWindow, Iterate


class Substep(eqx.Module):
    """What one step of the wrapped solver returns. (Apart from its solver state.)"""

    y1: PyTree[Array]
    y_error: PyTree[Array] | None
    dense_info: dict[str, Any]
    result: RESULTS


def jvp_compatible(solver: AbstractSolver) -> AbstractSolver:
    """Diffrax's default for the loop over stages cannot be differentiated in forward
    mode, which is how Jacobians are computed."""

    def fix(x):
        if not has_scan_kind(x):
            return x
        # Each of them understands only one of those that can.
        kind = "lax" if issubclass(type(x), AbstractSRK) else "bounded"
        is_none = lambda s: s is None
        return eqx.tree_at(lambda s: s.scan_kind, x, kind, is_leaf=is_none)

    # Of the class itself: `isinstance` is also true for solvers that wrap such a one.
    has_scan_kind = lambda x: issubclass(type(x), (AbstractRungeKutta, AbstractSRK))
    return cast(AbstractSolver, jtu.tree_map(fix, solver, is_leaf=has_scan_kind))


class AbstractMapWindow(AbstractWindow):
    """Every substep is a map of which nothing is known but its values."""

    @property
    def stage_shape(self) -> tuple[int, int]:
        return 0, 0

    @property
    def is_explicit(self) -> bool:
        return True

    @property
    def is_bounded(self) -> bool:
        # What is far beyond the solution overflows, or is damped.
        return False

    def points(self, at: Iterate) -> Float[Array, "substeps 1 size"]:
        return self.starts(at.ys)[:, None]

    def targets(
        self, at: Iterate, values: Float[Array, "substeps 1 1 size"]
    ) -> Iterate:
        return Iterate(values[:, 0, 0], at.ks)

    def idle(self, at: Iterate) -> Float[Array, "substeps 1 1 size"]:
        return at.ys[:, None, None]

    @property
    def idle_jacobian(self) -> float:
        return 1.0

    def eliminate(self, J: Matrices) -> AbstractElimination:
        return _MapElimination(J[:, 0, 0])

    def net(self, r: Iterate) -> Float[Array, "substeps size"]:
        return r.ys

    def as_residual(self, errors: Float[Array, "substeps 1 1 size"]) -> Iterate:
        return self.interpolated(errors[:, 0, 0])

    def interpolated(self, ys: Float[Array, "substeps size"]) -> Iterate:
        return Iterate(ys, jnp.zeros((len(ys), 0, 0, ys.shape[1]), ys.dtype))

    def sequential(self) -> Iterate:
        def body(y, x):
            y1 = self.value(x, y[None])[0, 0]
            return y1, y1

        _, ys = lax.scan(body, self.y0, self.xs)
        return self.interpolated(ys)

    def derivative(self, at, tangent, start, b):
        core, t_core = self.core, tangent.core

        def body(dy, inputs):
            x, t_x, y, b = inputs
            value = lambda core, x, y: core.value(x, y[None])[0, 0]
            y1, dy = eqx.filter_jvp(value, (core, x, y), (t_core, t_x, dy))
            dy = with_zeros(dy, y1)
            dy = dy if b is None else dy + b.ys
            return dy, dy

        # Otherwise backwards all evaluations would be stored before any is needed.
        body = jax.checkpoint(body, prevent_cse=False)
        inputs = (self.xs, tangent.xs, self.starts(at.ys), b)
        _, dys = lax.scan(body, start, inputs)
        return Iterate(dys, at.ks)


class _MapElimination(AbstractElimination):
    A: Matrices
    is_exact: bool = eqx.field(default=True, static=True)

    def condense(self, r: Iterate) -> Iterate:
        return r

    def substitute(
        self, starts: Float[Array, "substeps size"], condensed: Iterate
    ) -> Float[Array, "substeps 0 0 size"]:
        return condensed.ks


class StepWindow(AbstractMapWindow):
    """Steps of a solver that is not a Runge--Kutta method."""

    fn: Callable
    # Of each substep when it begins, when it ends, and the controls of its terms.
    xs: tuple[Array, Array, PyTree[Array]]
    y0: Float[Array, " size"]
    eps: float
    sharding: NamedSharding | None = eqx.field(static=True)

    def value(
        self, x: PyTree[Array], points: Float[Array, "1 size"]
    ) -> Float[Array, "1 1 size"]:
        return self.fn(x, points[0])[None, None]
