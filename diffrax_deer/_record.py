"""Runs Diffrax's own loop over the steps, and keeps what they went through."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import (
    AbstractSolver,
    AbstractStepSizeController,
    is_okay,
    RESULTS,
    SaveAt,
)
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree, Real

from ._custom_types import RealScalarLike
from ._event import first_crossing
from ._solver import DeerSolver
from ._window import Discretisation, Substep, tableau_of, uniform_grid


class Recording(eqx.Module):
    """All windows that were accepted. Those after the first `num_windows` are unused.

    **Attributes:**

    - `t0s`, `t1s`: the times at which each window begins and ends.
    - `ys`, `ks`: the values at the ends of all of their substeps, and the stages of
        these.
    - `final_state`: what Diffrax's loop ended with.
    """

    t0s: Real[Array, " windows"]
    t1s: Real[Array, " windows"]
    ys: Float[Array, "windows substeps size"]
    ks: Float[Array, "windows substeps parts stages size"]
    num_windows: Int[Array, ""]
    # More windows would have been needed than there is memory for.
    full: Bool[Array, ""]
    num_iterations: Int[Array, ""]
    max_window_iterations: Int[Array, ""]
    sequential_evaluations: Int[Array, ""]
    # The substep of the last window in which an event occurred, and which event.
    event_substep: Int[Array, ""]
    event_mask: PyTree[Bool[Array, ""]]
    solver_state: PyTree[Any]
    controller_state: PyTree[Any]
    final_state: Any


class _Made(eqx.Module):
    """A window, as an attempt to make it has left it."""

    y1: PyTree[Array]
    y_error: PyTree[Array] | None
    ts: Real[Array, " substeps_plus_1"]
    ys: PyTree[Array]
    ks: Float[Array, "substeps parts stages size"]
    solver_state: PyTree[Any]
    result: RESULTS
    num_iterations: Int[Array, ""] | int
    sequential_evaluations: Int[Array, ""] | int


class StepWindows(eqx.Module):
    """Every step of the solver is a window."""

    solver: AbstractSolver

    @property
    def size(self) -> int:
        return self.solver.substeps if type(self.solver) is DeerSolver else 1

    @property
    def one_step_solver(self) -> AbstractSolver:
        return self.solver.solver if type(self.solver) is DeerSolver else self.solver

    def make(self, terms, t0, t1, y0, args, solver_state, made_jump) -> _Made:
        ts = uniform_grid(t0, t1, self.size)
        if type(self.solver) is DeerSolver:
            return _solve_window(self.solver, ts, terms, y0, args, solver_state)
        y1, y_error, dense_info, state, result = self.solver.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        step = Discretisation(self.solver, terms, args, ts[:-1], ts[1:], y0)
        substep = Substep(y1, y_error, dense_info, result)
        return _Made(
            *(y1, y_error, ts, jtu.tree_map(lambda y: y[None], y1)),
            ks=step.stages(t0, t1, y0, substep)[None],
            solver_state=state,
            result=result,
            num_iterations=0,
            sequential_evaluations=step.sequential_span,
        )


class MergedWindows(eqx.Module):
    """Every window consists of many steps of a `DeerSolver`, at times known before."""

    solver: DeerSolver
    ts: Real[Array, " steps_plus_1"]
    steps: int

    @property
    def size(self) -> int:
        return self.steps * self.solver.substeps

    @property
    def one_step_solver(self) -> AbstractSolver:
        return self.solver.solver

    def make(self, terms, t0, t1, y0, args, solver_state, made_jump) -> _Made:
        del made_jump
        index, _ = solver_state
        ts = lax.dynamic_slice_in_dim(self.ts, index * self.steps, self.steps + 1)
        grid = eqx.filter_vmap(uniform_grid, in_axes=(0, 0, None))(
            ts[:-1], ts[1:], self.solver.substeps
        )
        ts = jnp.append(grid[:, :-1].reshape(-1), t1)
        made = _solve_window(self.solver, ts, terms, y0, args, None)
        state = (index + 1, made.solver_state)
        return eqx.tree_at(lambda m: m.solver_state, made, state)


def _solve_window(solver: DeerSolver, ts, terms, y0, args, solver_state) -> _Made:
    y1, y_error, _, state, result, at = solver.solve_window(
        terms, ts, y0, args, solver_state
    )
    return _Made(
        *(y1, y_error, ts, state.ys, at.ks, state, result),
        num_iterations=state.num_iterations,
        sequential_evaluations=state.sequential_evaluations,
    )


class _MergedController(eqx.Module):
    ts: Real[Array, " steps_plus_1"]
    steps: int

    def adapt_step_size(self, t0, t1, y0, y1, args, y_error, error_order, state):
        del t0, y0, y1, args, y_error, error_order
        last = len(self.ts) - 1
        tnext = self.ts[jnp.minimum((state + 1) * self.steps, last)]
        return True, t1, tnext, False, state + 1, RESULTS.successful


# What follows takes the place of the solver and of the step size controller inside
# Diffrax's loop. The solver hands over the trajectory as its `dense_info`, of which
# Diffrax keeps that of each accepted step, and tells the controller what it has found
# beside its error estimate.


class _SolverState(eqx.Module):
    state: PyTree[Any]
    event_substep: Int[Array, ""]
    event_mask: PyTree[Bool[Array, ""]]


class _ControllerState(eqx.Module):
    state: PyTree[Any]
    num_windows: Int[Array, ""]
    full: Bool[Array, ""]
    num_iterations: Real[Array, ""]
    max_window_iterations: Real[Array, ""]
    sequential_evaluations: Real[Array, ""]


class _RecordingSolver(eqx.Module):
    windows: StepWindows | MergedWindows
    event: Any
    call_event: Callable

    def error_order(self, terms):
        return self.windows.solver.error_order(terms)

    def interpolation_cls(self, **kwargs):
        # Nothing is saved inside the loop.
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        made = self.windows.make(terms, t0, t1, y0, args, solver_state.state, made_jump)
        occurred = jnp.array(False)
        substep, mask = solver_state.event_substep, solver_state.event_mask
        if self.event is not None:
            ys = jtu.tree_map(lambda y, ys: jnp.concatenate([y[None], ys]), y0, made.ys)
            occurred, substep, mask = first_crossing(
                self.event, self.call_event, made.ts, ys
            )
        dtype = jnp.result_type(t0)
        okay = (made.result == RESULTS.successful).astype(dtype)
        message = (
            occurred.astype(dtype),
            jnp.asarray(made.num_iterations, dtype),
            jnp.asarray(made.sequential_evaluations, dtype),
        )
        ravel = lambda y: ravel_pytree(y)[0]
        ys = jax.vmap(ravel, axis_size=self.windows.size)(made.ys)
        return (
            made.y1,
            (made.y_error, message),
            dict(times=jnp.stack([t0, t1, okay]), ys=ys, ks=made.ks),
            _SolverState(made.solver_state, substep, mask),
            made.result,
        )


class _RecordingController(eqx.Module):
    controller: AbstractStepSizeController | _MergedController
    t1: RealScalarLike
    # `None` if there is memory for as many windows as steps are allowed.
    max_windows: int | None

    def adapt_step_size(self, t0, t1, y0, y1, args, y_error, error_order, state):
        y_error, (event_occurred, num_iterations, span) = y_error
        keep, tprev, tnext, made_jump, inner, result = self.controller.adapt_step_size(
            t0, t1, y0, y1, args, y_error, error_order, state.state
        )
        num_windows = state.num_windows + jnp.where(keep, 1, 0).astype(jnp.int32)
        event_occurred = keep & (event_occurred > 0)
        if self.max_windows is None:
            full = jnp.array(False)
        else:
            full = (num_windows >= self.max_windows) & (tprev < self.t1)
            full = full & jnp.invert(event_occurred)
        okay = is_okay(result)
        result = RESULTS.where(okay & full, RESULTS.max_steps_reached, result)
        result = RESULTS.where(okay & event_occurred, RESULTS.event_occurred, result)
        state = _ControllerState(
            inner,
            num_windows,
            full,
            state.num_iterations + num_iterations,
            jnp.maximum(state.max_window_iterations, num_iterations),
            state.sequential_evaluations + span,
        )
        return keep, tprev, tnext, made_jump, state, result


def record(
    loop: Callable,
    windows: StepWindows | MergedWindows,
    controller: AbstractStepSizeController,
    event: Any,
    call_event: Callable,
    max_windows: int,
    max_steps: int | None,
    init_state: Any,
    *,
    t0: RealScalarLike,
    t1: RealScalarLike,
    **kwargs: Any,
) -> Recording:
    """`loop` is Diffrax's, and so are `init_state` and `kwargs`."""
    merged = isinstance(windows, MergedWindows)
    solver_state = init_state.solver_state
    controller_state = init_state.controller_state
    tnext = init_state.tnext
    if merged:
        # The trajectory is not used: there is no window twice.
        longer = lambda x: jnp.zeros((windows.size, *x.shape[1:]), x.dtype)
        longer = jtu.tree_map(longer, solver_state.ys)
        solver_state = (0, eqx.tree_at(lambda s: s.ys, solver_state, longer))
        controller_state = 1
        controller = _MergedController(windows.ts, windows.steps)  # pyright: ignore
        tnext = windows.ts[windows.steps]
        if max_steps is not None:
            max_steps = -(-max_steps // windows.steps)
    zero = jnp.array(0, jnp.int32)
    may_be_full = max_steps is None or max_windows < max_steps
    y0, _ = ravel_pytree(init_state.y)
    tableau = tableau_of(windows.one_step_solver)
    stages = (0, 0) if tableau is None else (tableau.parts, tableau.stages)
    time_dtype = jnp.result_type(t0)

    init_state = dataclasses.replace(
        init_state,
        tnext=tnext,
        solver_state=_SolverState(solver_state, zero, init_state.event_mask),
        controller_state=_ControllerState(
            controller_state,
            zero,
            jnp.array(False),
            *(jnp.zeros((), time_dtype) for _ in range(3)),
        ),
        save_state=None,
        dense_ts=jnp.full(max_windows + 1, jnp.inf, time_dtype),
        dense_infos=dict(
            times=jnp.zeros((max_windows, 3), time_dtype),
            ys=jnp.zeros((max_windows, windows.size, y0.size), y0.dtype),
            ks=jnp.zeros((max_windows, windows.size, *stages, y0.size), y0.dtype),
        ),
        dense_save_index=0,
        event_tprev=None,
        event_tnext=None,
        event_dense_info=None,
        event_values=None,
        event_mask=None,
    )
    # With a single step this is no loop at all, which is quicker to compile.
    kind = "bounded" if max_steps == 1 else "lax"
    while_loop = ft.partial(eqxi.while_loop, kind=kind)
    final_state, _ = loop(
        solver=_RecordingSolver(windows, event, call_event),
        stepsize_controller=_RecordingController(
            controller, t1, max_windows if may_be_full else None
        ),
        event=None,
        saveat=SaveAt(dense=True),
        t0=t0,
        t1=t1,
        max_steps=max_steps,
        init_state=init_state,
        inner_while_loop=while_loop,
        outer_while_loop=while_loop,
        **kwargs,
    )
    solver_state = final_state.solver_state
    controller_state = final_state.controller_state
    infos = final_state.dense_infos
    t0s, t1s, okay = jnp.unstack(infos["times"], axis=-1)
    return Recording(
        t0s=t0s,
        t1s=t1s,
        ys=infos["ys"],
        ks=infos["ks"],
        # A window that failed ends the solve, even if it has been accepted.
        num_windows=jnp.sum(okay == 1, dtype=jnp.int32),
        full=controller_state.full,
        num_iterations=controller_state.num_iterations.astype(jnp.int32),
        max_window_iterations=controller_state.max_window_iterations.astype(jnp.int32),
        sequential_evaluations=controller_state.sequential_evaluations.astype(
            jnp.int32
        ),
        event_substep=solver_state.event_substep,
        event_mask=solver_state.event_mask,
        solver_state=solver_state.state[1] if merged else solver_state.state,
        controller_state=controller_state.state,
        final_state=final_state,
    )
