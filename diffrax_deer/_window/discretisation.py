import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import (
    AbstractLocalInterpolation,
    AbstractSolver,
    AbstractTerm,
    RESULTS,
)
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree, Real

from .._custom_types import IntScalarLike
from .base import AbstractWindow, Iterate
from .one_step import OneStepMap, StepWindow, Substep
from .stages import StageWindow
from .tableau import Tableau, tableau_of


class Discretisation(eqx.Module):
    """A differential equation and a solver, on a grid.

    **Attributes:**

    - `solver`: makes the steps. Any one-step method.
    - `terms`, `args`: the differential equation.
    - `t0s`, `t1s`: when each of the steps begins and ends.
    - `y0`: the value at the first of these.
    - `window`: all of its steps, to be solved jointly.
    """

    solver: AbstractSolver
    terms: PyTree[AbstractTerm]
    args: PyTree[Any]
    t0s: Real[Array, " substeps"]
    t1s: Real[Array, " substeps"]
    y0: PyTree[Array]
    window: AbstractWindow

    def __init__(
        self,
        solver: AbstractSolver,
        terms: PyTree[AbstractTerm],
        args: PyTree[Any],
        t0s: Real[Array, " substeps"],
        t1s: Real[Array, " substeps"],
        y0: PyTree[Array],
    ):
        self.solver, self.terms, self.args = solver, terms, args
        self.t0s, self.t1s, self.y0 = t0s, t1s, y0
        self.window = self._window()

    @property
    def ts(self) -> Real[Array, " substeps_plus_1"]:
        """The grid."""
        return jnp.concatenate([self.t0s, self.t1s[-1:]])

    @property
    def substeps(self) -> int:
        return len(self.t0s)

    @property
    def tableau(self) -> Tableau | None:
        return tableau_of(self.solver)

    def on(
        self, ts: Real[Array, " substeps_plus_1"], solver: AbstractSolver | None = None
    ) -> "Discretisation":
        """The same on another grid."""
        solver = self.solver if solver is None else solver
        return Discretisation(solver, self.terms, self.args, ts[:-1], ts[1:], self.y0)

    def _window(self) -> AbstractWindow:
        y0, eps = self.ravel(self.y0), precision(self.y0)
        t0s, t1s = self.t0s, self.t1s
        tableau = self.tableau
        if tableau is None:
            fn = lambda t0, t1, y: self.ravel(self._step(t0, t1, self.unravel(y)).y1)
            fn = eqx.filter_closure_convert(fn, t0s[0], t1s[0], y0)
            return StepWindow(fn=fn, xs=(t0s, t1s), y0=y0, eps=eps)
        terms: Any = self.terms
        terms = terms.terms if tableau.is_split else (terms,)
        controls = tuple(jax.vmap(term.contr)(t0s, t1s) for term in terms)
        fns = []
        for term, control in zip(terms, controls):
            fn = ft.partial(self._increment, term)
            control = jtu.tree_map(lambda x: x[0], control)
            fns.append(eqx.filter_closure_convert(fn, control, t0s[0], y0))
        xs = (t0s, t1s, controls)
        return StageWindow(fns=tuple(fns), xs=xs, y0=y0, eps=eps, tableau=tableau)

    def sequential(self) -> Iterate:
        """The solution, by one step after the other."""
        window, tableau = self.window, self.tableau
        if tableau is not None and tableau.is_explicit:
            assert isinstance(window, StageWindow)
            return window.sequential()

        def body(y, t0__t1):
            t0, t1 = t0__t1
            substep = self._step(t0, t1, y)
            return substep.y1, (self.ravel(substep.y1), self.stages(t0, t1, y, substep))

        _, (ys, ks) = lax.scan(body, self.y0, (self.t0s, self.t1s))
        return Iterate(ys, ks)

    @property
    def sequential_span(self) -> int:
        """How many evaluations follow one another in all steps. (Of a solver that is no
        Runge--Kutta method, how many steps.)"""
        tableau = self.tableau
        return self.substeps * (1 if tableau is None else tableau.stages)

    def stages(self, t0, t1, y0, substep: Substep) -> Float[Array, "parts stages size"]:
        """The stages that a step of the solver has gone through."""
        tableau = self.tableau
        if tableau is None:
            return jnp.zeros((0, 0, self.ravel(y0).size), self.ravel(y0).dtype)
        elif tableau.has_dense_stages:
            ks = substep.dense_info["k"]
            ks = ks if tableau.is_split else (ks,)
            ravel_all = jax.vmap(self.ravel, axis_size=tableau.stages)
            return jnp.stack([ravel_all(k) for k in ks])
        else:
            # The implicit Euler method, and the stage that its error estimate needs.
            terms: Any = self.terms
            k0 = self._increment(terms, terms.contr(t0, t1), t0, self.ravel(y0))
            k1 = self.ravel(substep.y1) - self.ravel(y0)
            return jnp.stack([k0, k1])[None]

    def outputs(self, at: Iterate) -> Substep:
        """What the solver returns for each of its steps."""
        return self._outputs(at, slice(None))

    def _outputs(self, at, index):
        starts = self.window.starts(at.ys)[index]
        y0s, y1s = self.unravel_all(starts), self.unravel_all(at.ys[index])
        window, tableau = self.window, self.tableau
        if tableau is None:
            return jax.vmap(self._step)(self.t0s[index], self.t1s[index], y0s)
        assert isinstance(window, StageWindow)
        ks = at.ks[index]
        dense_info = dict(y0=y0s, y1=y1s)
        if tableau.has_dense_stages:
            unravel_all = jax.vmap(self.unravel_all)
            k = tuple(unravel_all(ks[:, part]) for part in range(tableau.parts))
            dense_info["k"] = k if tableau.is_split else k[0]
        y_error = self.unravel_all(window.errors(ks))
        return Substep(y1s, y_error, dense_info, RESULTS.successful)

    def evaluate(
        self, at: Iterate, ts: Real[Array, " times"], used: IntScalarLike | None = None
    ) -> PyTree[Array]:
        """The solution at many times at once, by the interpolation of the solver. If
        only some of the steps are `used`, then this is about these."""
        last = self.substeps - 1 if used is None else jnp.maximum(used - 1, 0)
        index = jnp.searchsorted(lax.stop_gradient(self.t1s), ts)
        index = jnp.clip(index, 0, last)
        # Of a solver that has to make its steps again, make as few as possible.
        if self.tableau is None and 2 * len(ts) >= self.substeps:
            infos = jtu.tree_map(lambda x: x[index], self.outputs(at).dense_info)
        else:
            infos = self._outputs(at, index).dense_info

        def evaluate(t, t0, t1, info):
            return self._interpolation(t0, t1, info).evaluate(t)

        return jax.vmap(evaluate)(ts, self.t0s[index], self.t1s[index], infos)

    def interpolation(
        self, at: Iterate, index: IntScalarLike
    ) -> AbstractLocalInterpolation:
        """The interpolation over one of the steps."""
        index = jnp.asarray(index)[None]
        infos = self._outputs(at, index).dense_info
        t0, t1, info = jtu.tree_map(
            lambda x: x[0], (self.t0s[index], self.t1s[index], infos)
        )
        return self._interpolation(t0, t1, info)

    def _interpolation(self, t0, t1, info):
        # Interpolations divide by their length, which may be zero if nothing is solved.
        t1 = jnp.where(t0 == t1, t0 + 1, t1)
        return self.solver.interpolation_cls(t0=t0, t1=t1, **info)

    def ravel(self, y: PyTree[Array]) -> Float[Array, " size"]:
        return ravel_pytree(y)[0]

    @property
    def unravel(self) -> Callable[[Float[Array, " size"]], PyTree[Array]]:
        return ravel_pytree(self.y0)[1]

    # The size of the axis has to be given for the sake of states without any leaf.

    def ravel_all(self, ys: PyTree[Array]) -> Float[Array, "substeps size"]:
        return jax.vmap(self.ravel, axis_size=self.substeps)(ys)

    def unravel_all(self, ys: Float[Array, "substeps size"]) -> PyTree[Array]:
        return jax.vmap(self.unravel)(ys)

    def _step(self, t0, t1, y0) -> Substep:
        return OneStepMap(self.solver, self.terms, self.args)(t0, t1, y0)

    def _increment(self, term, control, t, y):
        return self.ravel(term.vf_prod(t, self.unravel(y), self.args, control))


def precision(y: PyTree[Array]) -> float:
    """That of the least precise leaf of a state, or zero if it has none."""
    leaves = jtu.tree_leaves(y)
    return max((float(jnp.finfo(leaf.dtype).eps) for leaf in leaves), default=0.0)
