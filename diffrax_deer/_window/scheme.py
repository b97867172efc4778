import functools as ft
import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import (
    AbstractLocalInterpolation,
    AbstractSolver,
    AbstractTerm,
    MultiTerm,
    ODETerm,
    RESULTS,
)
from diffrax._term import WrapTerm
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Real

from .._custom_types import DenseInfo, PyTree, RealScalarLike, Terms, Y
from .._time_axis import divided, last
from .base import AbstractWindow, Iterate
from .control import batched, controls, with_controls
from .elimination import weighted
from .one_step import jvp_compatible, StepWindow, Substep
from .quadrature import integrate, ReadTerm, Split, which_are_read, Whole
from .reals import ravel, unravel_like
from .stage_interpolation import interpolation_of
from .stages import StageWindow
from .tableau import Tableau, tableau_of


class Scheme(eqx.Module):
    """A differential equation and a solver, for whatever grid.

    **Attributes:**

    - `solver`: makes the steps. Any one-step method.
    - `terms`, `args`: the differential equation.
    - `y0`: what its state looks like.
    - `reads`: which leaves of it the vector field reads.
    """

    solver: AbstractSolver[Any]
    terms: Terms
    args: PyTree[Any]
    y0: PyTree[Array]
    reads: tuple[bool, ...] = eqx.field(static=True)

    @property
    def split(self) -> Split:
        return Split(self.y0, self.reads)

    @property
    def core(self) -> "Scheme":
        """The same, for what is read only."""
        split = self.split
        if split.is_trivial:
            return self
        terms = [ReadTerm(term, split) for term in _parts(self.tableau, self.terms)]
        terms = terms[0] if len(terms) == 1 else MultiTerm(*terms)
        reads = tuple(filter(None, self.reads))
        return Scheme(self.solver, terms, self.args, split.read(self.y0), reads)

    @property
    def tableau(self) -> Tableau | None:
        return tableau_of(self.solver)

    @property
    def stage_shape(self) -> tuple[int, int]:
        """How many parts and stages are unknown in each step."""
        tableau = self.tableau
        return (0, 0) if tableau is None else (tableau.parts, tableau.stages)

    @property
    def is_explicit(self) -> bool:
        """Whether the steps are explicit, or maps of which nothing else is known."""
        return self.tableau is None or self.tableau.is_explicit

    @property
    def is_fsal(self) -> bool:
        """Whether the last stage of a step is the first one of the next, but for their
        lengths."""
        if self.tableau is None or not self.tableau.is_fsal:
            return False
        return all(map(_is_ode, _parts(self.tableau, self.terms)))

    @property
    def span(self) -> int:
        """How many evaluations follow one another in a step. (Of a solver that is no
        Runge--Kutta method, how many steps.)"""
        return 1 if self.tableau is None else self.tableau.core.stages

    def window(
        self,
        t0s: Real[Array, " substeps"],
        t1s: Real[Array, " substeps"],
        y0: Float[Array, " size"],
        sharding: NamedSharding | None = None,
    ) -> AbstractWindow:
        """The equations of many steps."""
        eps, tableau = precision(self.y0), self.tableau
        xs = divided(self.inputs(*divided((t0s, t1s), sharding)), sharding)
        x = t0, _, first_controls = jtu.tree_map(lambda x: x[0], xs)
        if tableau is None:
            fn = lambda x, y: self.ravel(self.step(x, self.unravel(y)).y1)
            fn = eqx.filter_closure_convert(fn, x, y0)
            return StepWindow(fn=fn, xs=xs, y0=y0, eps=eps, sharding=sharding)
        fns = []
        for term, control in zip(_parts(tableau, self.terms), first_controls):
            fn = ft.partial(self._increment, term)
            fns.append(eqx.filter_closure_convert(fn, control, t0, y0))
        return StageWindow(
            fns=tuple(fns),
            xs=xs,
            y0=y0,
            eps=eps,
            sharding=sharding,
            tableau=tableau.core,
        )

    def inputs(
        self, t0s: Real[Array, " steps"], t1s: Real[Array, " steps"]
    ) -> tuple[Array, Array, PyTree[Array]]:
        """What many steps depend on, beside the values at their starts: when they begin
        and end, and their controls."""
        if self.tableau is None:
            kwargs = self.solver.term_compatible_contr_kwargs
            return t0s, t1s, controls(self.terms, kwargs, t0s, t1s)
        parts = _parts(self.tableau, batched(self.terms))
        return t0s, t1s, tuple(jax.vmap(term.contr)(t0s, t1s) for term in parts)

    def step(self, x: tuple[Array, Array, PyTree[Array]], y0: Y) -> Substep:
        """One of these steps, by a solver that is no Runge--Kutta method."""
        t0, t1, controls = x
        solver, args = jvp_compatible(self.solver), self.args
        kwargs = solver.term_compatible_contr_kwargs
        terms = with_controls(self.terms, kwargs, t0, t1, controls)
        # A one-step method has no memory: its state only ever caches what can be found
        # from `(t0, t1, y0)` as well. So each substep begins with a new one.
        state = solver.init(terms, t0, t1, y0, args)
        y1, y_error, dense_info, _, result = solver.step(
            terms, t0, t1, y0, args, state, made_jump=False
        )
        return Substep(y1, y_error, dense_info, result)

    def stages(
        self,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        y1: Y,
        dense_info: DenseInfo,
    ) -> Float[Array, "parts stages size"]:
        """The stages that a step of the solver has gone through."""
        tableau = self.tableau
        if tableau is None:
            return jnp.zeros((0, 0, self.ravel(y0).size), self.ravel(y0).dtype)
        elif tableau.has_dense_stages:
            ks = dense_info["k"]
            ks = ks if tableau.is_split else (ks,)
            return jnp.stack([self.ravel_all(k, tableau.stages) for k in ks])
        else:
            # The implicit Euler method, and the stage that its error estimate needs.
            terms: Any = self.terms
            k0 = self._increment(terms, terms.contr(t0, t1), t0, self.ravel(y0))
            k1 = self.ravel(y1) - self.ravel(y0)
            return jnp.stack([k0, k1])[None]

    def outputs(
        self,
        xs: tuple[Array, Array, PyTree[Array]],
        starts: Float[Array, "steps size"],
        at: Iterate,
        errors: Float[Array, "steps size"] | None,
    ) -> Substep:
        """What the solver returns for each of many steps. `errors` are their error
        estimates, if these follow from the stages and are asked for."""
        y0s, y1s = self.unravel_all(starts), self.unravel_all(at.ys)
        tableau = self.tableau
        if tableau is None:
            return jax.vmap(self.step)(xs, y0s)
        dense_info = dict(y0=y0s, y1=y1s)
        if tableau.has_dense_stages:
            unravel_all = jax.vmap(self.unravel_all)
            k = tuple(unravel_all(at.ks[:, part]) for part in range(tableau.parts))
            dense_info["k"] = k if tableau.is_split else k[0]
        y_error = None if errors is None else self.unravel_all(errors)
        return Substep(y1s, y_error, dense_info, RESULTS.successful)

    def unknowns(self, at: Iterate) -> Iterate:
        """Of all, those that are solved for."""
        ks, tableau = at.ks, self.tableau
        if tableau is not None:
            each = jnp.split(ks, tableau.stages, axis=2)
            each = itertools.compress(each, tableau.is_unknown)
            ks = jnp.concatenate([*each], axis=2)
        return Iterate(self.read(at.ys), self.read(ks))

    def whole(
        self, window: AbstractWindow, at: Iterate, may_have_gaps: bool = False
    ) -> Whole:
        """All, given those that are solved for. There are gaps if a step does not begin
        exactly where that before it ends, as around a jump."""
        tableau, split = self.tableau, self.split
        errors = None
        if tableau is not None:
            assert isinstance(window, StageWindow)
            at = window.completed(at, tableau, self.is_fsal and not may_have_gaps)
            errors = weighted(tableau.b_error, at.ks)
        whole = Whole(window.y0, last(at.ys, window.sharding), at, errors)
        if split.is_trivial:
            return whole
        assert tableau is not None
        core, y0 = self.core, split.unread(self.y0)

        def increment(term, control, t, y):
            y = split.filled(core.unravel(y))
            y = term.vf_prod(t, y, self.args, control)
            return ravel(split.unread(y), y0)

        terms = _parts(tableau, self.terms)
        fns = tuple(ft.partial(increment, term) for term in terms)
        points = window.starts(at.ys)[:, None] + weighted(tableau.A, at.ks)
        unread = integrate(
            *(fns, tableau, window.xs, points, ravel(y0, y0), window.sharding)
        )
        return jtu.tree_map(self._join, whole, unread)

    def read(self, x: Float[Array, "*shape size"]) -> Float[Array, "*shape _size"]:
        """Of vectors, what is read."""
        split, core = self.split, self.core
        if split.is_trivial:
            return x
        return _along_last(lambda x: core.ravel(split.read(self.unravel(x))), x)

    def _join(self, read, unread):
        core, rest = self.core, unravel_like(self.split.unread(self.y0))
        join = lambda x, y: self.ravel(eqx.combine(core.unravel(x), rest(y)))
        return _along_last(join, read, unread)

    def interpolation(
        self, t0: RealScalarLike, t1: RealScalarLike, dense_info: DenseInfo
    ) -> AbstractLocalInterpolation:
        """The interpolation over one step."""
        # Interpolations divide by their length, which may be zero if nothing is solved.
        t1 = jnp.where(t0 == t1, t0 + 1, t1)
        return interpolation_of(self.solver)(t0=t0, t1=t1, **dense_info)

    def evaluate(
        self,
        ts: Real[Array, " times"],
        t0s: Real[Array, " times"],
        t1s: Real[Array, " times"],
        dense_infos: PyTree[Array],
    ) -> PyTree[Array]:
        """The solution at many times, each in a step of its own."""

        def one(t, t0, t1, dense_info):
            return self.interpolation(t0, t1, dense_info).evaluate(t)

        return jax.vmap(one)(ts, t0s, t1s, dense_infos)

    def ravel(self, y: PyTree[Array]) -> Float[Array, " size"]:
        return ravel(y, self.y0)

    @property
    def unravel(self) -> Callable[[Float[Array, " size"]], PyTree[Array]]:
        return unravel_like(self.y0)

    def ravel_all(self, ys: PyTree[Array], length: int) -> Float[Array, "length size"]:
        # The size of the axis has to be given for the sake of states without any leaf.
        return jax.vmap(self.ravel, axis_size=length)(ys)

    def unravel_all(self, ys: Float[Array, "length size"]) -> PyTree[Array]:
        return jax.vmap(self.unravel)(ys)

    def _increment(self, term, control, t, y):
        return self.ravel(term.vf_prod(t, self.unravel(y), self.args, control))


def leaves_read(
    solver: AbstractSolver,
    terms: PyTree[AbstractTerm],
    t0: Any,
    t1: Any,
    y0: PyTree[Array],
    args: PyTree[Any],
    is_sequential: Callable[[], bool] = lambda: False,
) -> tuple[bool, ...]:
    """Which leaves of the state the vector field reads. All if the solver is not a
    Runge--Kutta method, as then nothing is known of what it evaluates.

    If steps are made one after the other, then what is not read costs least on the way,
    and is only told apart if it is large. (It would have to be stored.)
    """
    leaves, tableau = jtu.tree_leaves(y0), tableau_of(solver)
    everything = (True,) * len(leaves)
    if tableau is None:
        return everything

    def increments(y):
        parts = _parts(tableau, terms)
        return [part.vf_prod(t0, y, args, part.contr(t0, t1)) for part in parts]

    reads = which_are_read(increments, y0)
    size = lambda kind: sum(
        jnp.size(x) for x, is_read in zip(leaves, reads) if is_read == kind
    )
    is_small = size(False) <= size(True)
    may_be_made = tableau.is_explicit and is_small and not all(reads)
    return everything if may_be_made and is_sequential() else reads


def _is_ode(term: AbstractTerm) -> bool:
    # Only then are increments known to be in proportion to the length of a step.
    while isinstance(term, (ReadTerm, WrapTerm)):
        term = term.term
    return type(term) is ODETerm


def _parts(tableau: Tableau | None, terms: Any) -> tuple[AbstractTerm, ...]:
    is_split = tableau is not None and tableau.is_split
    return terms.terms if is_split else (terms,)


def _along_last(fn, *xs):
    for _ in range(xs[0].ndim - 1):
        fn = jax.vmap(fn)
    return fn(*xs)


def precision(y: PyTree[Array]) -> float:
    """That of the least precise leaf of a state, or zero if it has none."""
    leaves = jtu.tree_leaves(y)
    return max((float(jnp.finfo(leaf.dtype).eps) for leaf in leaves), default=0.0)
