import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractSolver
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Real

from .._custom_types import PyTree, Terms
from .._time_axis import num_parts, place_in
from .base import AbstractWindow, Iterate
from .interpolation import time_at
from .one_step import Substep
from .quadrature import Whole
from .scheme import leaves_read, Scheme


class Discretisation(eqx.Module):
    """A differential equation and a solver, on a grid.

    **Attributes:**

    - `scheme`: the differential equation and the solver, that is, `solver`, `terms`,
        `args`, and the value `y0` at the start of the first step.
    - `t0s`, `t1s`: when each of the steps begins and ends.
    - `window`: all of its steps, to be solved jointly, for those leaves of the state
        that the vector field reads. The others are no unknowns.
    - `sharding`: how the time axis is divided over devices. `None` if it is not.
    """

    scheme: Scheme
    t0s: Real[Array, " substeps"]
    t1s: Real[Array, " substeps"]
    window: AbstractWindow
    sharding: NamedSharding | None = eqx.field(static=True)

    def __init__(
        self,
        scheme: Scheme,
        t0s: Real[Array, " substeps"],
        t1s: Real[Array, " substeps"],
        sharding: NamedSharding | None = None,
    ):
        if len(t0s) % num_parts(sharding) != 0:
            # A coarser grid, of so few that it is left whole.
            sharding = None
        self.scheme, self.t0s, self.t1s, self.sharding = scheme, t0s, t1s, sharding
        core = self.core
        self.window = core.window(t0s, t1s, core.ravel(core.y0), sharding)

    @property
    def solver(self) -> AbstractSolver[Any]:
        """Makes the steps. Any one-step method."""
        return self.scheme.solver

    @property
    def terms(self) -> Terms:
        return self.scheme.terms

    @property
    def args(self) -> PyTree[Any]:
        return self.scheme.args

    @property
    def y0(self) -> PyTree[Array]:
        """The value at the start of the first step."""
        return self.scheme.y0

    @property
    def core(self) -> Scheme:
        """The same, for what is read only."""
        return self.scheme.core

    @property
    def ts(self) -> Real[Array, " substeps_plus_1"]:
        """The grid."""
        return jnp.concatenate([self.t0s, self.t1s[-1:]])

    @property
    def substeps(self) -> int:
        return len(self.t0s)

    @property
    def fractions(self) -> Real[Array, " substeps_plus_1"]:
        """The grid, as fractions of the window."""
        length = self.t1s[-1] - self.t0s[0]
        fractions = (self.ts - self.t0s[0]) / jnp.where(length == 0, 1, length)
        return fractions.at[-1].set(1)

    def on(
        self,
        ts: Real[Array, " substeps_plus_1"],
        solver: AbstractSolver[Any] | None = None,
    ) -> "Discretisation":
        """The same on another grid."""
        return self._with(ts[:-1], ts[1:], solver)

    def moved(self, fractions: Real[Array, " substeps_plus_1"]) -> "Discretisation":
        """The same, with another grid for the same window."""
        return self.on(time_at(self.t0s[0], self.t1s[-1], fractions))

    def merged(
        self, factor: int, solver: AbstractSolver[Any] | None = None
    ) -> "Discretisation":
        """The same with `factor` steps at a time taken as one. Must be a divisor."""
        rows = lambda x: x.reshape(-1, factor)
        t0s, t1s = rows(self.t0s)[:, 0], rows(self.t1s)[:, -1]
        return self._with(t0s, t1s, solver)

    def whole(self, at: Iterate, may_have_gaps: bool = False) -> Whole:
        """The steps of the solver, of all leaves. There are gaps if one does not begin
        exactly where that before it ends, as around a jump."""
        return self.scheme.whole(self.window, at, may_have_gaps)

    def outputs(self, whole: Whole) -> Substep:
        """What the solver returns for each of its steps."""
        return self.scheme.outputs(
            *(self.window.xs, whole.starts, whole.at, whole.errors)
        )

    def evaluate(self, at: Iterate, ts: Real[Array, " times"]) -> PyTree[Array]:
        """The solution at many times at once, by the interpolation of the solver."""
        index = place_in(lax.stop_gradient(self.t1s), ts)
        index = jnp.clip(index, 0, self.substeps - 1)
        infos = self.outputs(self.whole(at)).dense_info
        infos = jtu.tree_map(lambda x: x[index], infos)
        return self.scheme.evaluate(ts, self.t0s[index], self.t1s[index], infos)

    def evaluate_within(
        self, whole: Whole, ts: Real[Array, "substeps times"]
    ) -> PyTree[Array]:
        """The same, at as many times in each of the substeps, given all that follows
        from the solution."""

        def row(ts, t0, t1, info):
            interpolation = self.scheme.interpolation(t0, t1, info)
            return jax.vmap(interpolation.evaluate)(ts)

        infos = self.outputs(whole).dense_info
        ys = jax.vmap(row)(ts, self.t0s, self.t1s, infos)
        return jtu.tree_map(lambda y: y.reshape(ts.size, *y.shape[2:]), ys)

    def ravel_all(self, ys: PyTree[Array]) -> Float[Array, "substeps size"]:
        """Of those leaves that are read. The others need not be there."""
        ys = self.scheme.split.read(ys)
        return self.core.ravel_all(ys, self.substeps)

    def unravel_all(self, ys: Float[Array, "length size"]) -> PyTree[Array]:
        """The inverse, with `None` for what is not read."""
        return self.core.unravel_all(ys)

    def _with(self, t0s, t1s, solver):
        scheme = self.scheme
        if solver is not None:
            # Of another solver, all leaves may have to be solved for.
            inputs = scheme.terms, t0s[0], t1s[0], scheme.y0, scheme.args
            reads = leaves_read(solver, *inputs)
            scheme = dataclasses.replace(scheme, solver=solver, reads=reads)
        return Discretisation(scheme, t0s, t1s, self.sharding)
