from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from diffrax import (
    AbstractSolver,
    AbstractTerm,
    AbstractWrappedSolver,
    LeapfrogMidpoint,
    RESULTS,
    ReversibleHeun,
    Tsit5,
)
from jaxtyping import Array, ArrayLike, Bool, Int, PyTree, Real, Scalar

from ._guess import AbstractGuess, CoarseGuess
from ._interpolation import uniform_grid, WindowInterpolationFactory
from ._joint import joint_solve, without_gradient
from ._method import AbstractMethod, DEER
from ._scan import AbstractScan, AutoScan
from ._step import OneStepMap


class DeerState(eqx.Module):
    """The `solver_state` of [`diffrax_deer.DeerSolver`][].

    **Attributes:**

    - `t0`, `t1`: the last window. (In Diffrax's internal time, which always runs
        forwards.)
    - `ys`: the trajectory over the last window. A PyTree like the state of the
        differential equation, whose leaves have a leading axis `substeps`: the values
        at the end of each substep.
    - `num_iterations`: how many iterations this window took.
    """

    t0: Real[Array, ""]
    t1: Real[Array, ""]
    ys: PyTree[Array]
    num_iterations: Int[Array, ""]


class DeerSolver(AbstractWrappedSolver[DeerState]):
    """Doc."""

    solver: AbstractSolver = Tsit5()
    substeps: int = eqx.field(default=64, static=True)
    _: KW_ONLY
    method: AbstractMethod = DEER()
    scan: AbstractScan = AutoScan()
    guess: AbstractGuess = CoarseGuess()
    rtol: float | None = None
    atol: float | None = None
    norm: Callable[[PyTree], Scalar] = optx.max_norm
    max_iters: int | None = eqx.field(default=None, static=True)

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def interpolation_cls(self):  # pyright: ignore
        return WindowInterpolationFactory(self.solver.interpolation_cls, self.substeps)

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    @property
    def scan_kind(self):
        return self.solver.scan_kind

    @property
    def root_finder(self):
        return self.solver.root_finder

    @property
    def root_find_max_steps(self):
        return self.solver.root_find_max_steps

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)

    def init(self, terms, t0, t1, y0, args):
        del terms, t1, args
        never = jnp.full_like(t0, jnp.nan)
        ys = jtu.tree_map(lambda y: jnp.zeros((self.substeps, *y.shape), y.dtype), y0)
        return DeerState(never, never, ys, jnp.array(0))

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del made_jump
        ts = uniform_grid(t0, t1, self.substeps)
        step = OneStepMap(self.solver, terms, ts, y0, args)
        flat_y0 = step.ravel(y0)
        rtol, atol = self._tolerances(flat_y0.dtype)

        def guess():
            same_window = (solver_state.t0 == t0) & (solver_state.t1 == t1)
            ys = lax.cond(
                same_window,
                lambda: solver_state.ys,
                lambda: self.guess(self.solver, terms, ts, y0, args),
            )
            ys = jax.vmap(step.ravel)(ys)
            finite = jnp.isfinite(ys).all(axis=-1, keepdims=True)
            return jnp.where(finite, ys, flat_y0)

        solution = joint_solve(
            step, flat_y0, without_gradient(guess), method=self.method, scan=self.scan,
            rtol=rtol, atol=atol, norm=self.norm,
            max_iters=self.substeps if self.max_iters is None else self.max_iters,
        )
        ys = solution.ys
        out = step.substeps(jnp.concatenate([flat_y0[None], ys[:-1]]))
        first_failure = jnp.argmax(out.result != RESULTS.successful)
        result = jtu.tree_map(lambda x: x[first_failure], out.result)
        result = RESULTS.where(solution.result == RESULTS.successful, result, solution.result)
        okay = result == RESULTS.successful
        y1 = step.unravel(jnp.where(okay, ys[-1], flat_y0))
        if out.y_error is None:
            y_error = None
        else:
            errors = lax.stop_gradient(jax.vmap(step.ravel)(out.y_error))
            y_error = self.scan(solution.A, errors)[-1]
            y_error = step.unravel(jnp.where(okay, y_error, jnp.inf))
        state = DeerState(t0, t1, lax.stop_gradient(jax.vmap(step.unravel)(ys)), solution.num_iterations)
        return y1, y_error, dict(dense_infos=out.dense_info), state, result

    def _tolerances(self, dtype):
        eps = float(jnp.finfo(dtype).eps)
        default = {2**-52: 1e-10, 2**-23: 1e-5}.get(eps, 100*eps)
        rtol = default if self.rtol is None else self.rtol
        atol = 1e-2 * default if self.atol is None else self.atol
        return rtol, atol
