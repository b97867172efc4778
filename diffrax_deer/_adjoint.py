import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import (
    AbstractAdjoint,
    AbstractSolver,
    AbstractStepSizeController,
    AbstractTerm,
    ClipStepSizeController,
    RESULTS,
    StepTo,
    SubSaveAt,
    UnsafeBrownianPath,
)
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int, PyTree, Real

from ._checks import check_one_step_solver, check_positive_int, check_state
from ._event import call_event, event_time
from ._implicit import Chunks, implicit_solution, without_gradient
from ._known_steps import advance, are_known, known_times, move_with
from ._method import DEER
from ._record import MergedWindows, record, Recording, StepWindows
from ._save import save
from ._scan import AutoScan
from ._solver import DeerSolver
from ._state import DeerState
from ._trajectory import Trajectory
from ._window import Discretisation, Iterate, tableau_of, uniform_grid


# By default, keep trajectories of up to this many bytes, or if that is more, of up to
# this many substeps.
_MAX_BYTES = 2**21
_MIN_SUBSTEPS = 2**12
# By default, merge up to this many substeps, but keep their Jacobians below this many
# bytes.
_MAX_MERGED = 2**14
_MAX_JACOBIAN_BYTES = 2**26
# By default, backpropagate through this many steps of a sequential solver at once. On a
# CPU that is one after the other, those of the last chunk that are not used included.
_SEQUENTIAL_CHUNK = 128
_CHUNK_ON_CPUS = 16


class _Layout(eqx.Module):
    """How much memory there is for what."""

    # Of Diffrax's solver.
    substeps_per_step: int
    # Of Diffrax's loop.
    steps_per_window: int
    max_windows: int
    # The number of substeps to backpropagate through jointly.
    chunk_size: int

    @property
    def max_steps(self) -> int:
        return self.max_windows * self.steps_per_window

    @property
    def max_substeps(self) -> int:
        return self.max_steps * self.substeps_per_step

    @property
    def window_size(self) -> int:
        return self.steps_per_window * self.substeps_per_step

    @property
    def num_chunks(self) -> int:
        return -(-self.max_substeps // self.chunk_size)


class DeerAdjoint(AbstractAdjoint):
    r"""Saves, backpropagates, and looks for events, in parallel over time.

    For use with [`diffrax_deer.DeerSolver`][], as
    `diffeqsolve(..., adjoint=DeerAdjoint())`. It first runs Diffrax's loop over the
    steps, in which it only keeps the trajectory. What is asked for follows from that:

    - **Saving.** All of `SaveAt(ts=...)` is interpolated in one batch. (Diffrax itself
        saves these points one after the other.) The functions of `SaveAt(fn=...)` are
        batched with `jax.vmap`.
    - **Derivatives** are those of the discretised equation, as with
        `diffrax.RecursiveCheckpointAdjoint`. They are given by the implicit function
        theorem: backwards through each window goes one linear recurrence, evaluated in
        parallel, and no iteration is made again. Forward mode and higher derivatives
        work as well, and so do derivatives with respect to `t0`, `t1`, the save times,
        `StepTo(ts=...)`, and `ClipStepSizeController(step_ts=..., jump_ts=...)`. All
        other times that an adaptive step size controller has chosen are treated as
        constants. There is none with respect to `solver_state`, `controller_state`
        and what the controller itself consists of.
    - **Steps known in advance**, those of `ConstantStepSize` and `StepTo`, are merged:
        with `DeerSolver(substeps=1)`, as many steps as fit become a single window. This
        gives the steps, saved values and statistics of the wrapped solver itself in the
        same call of `diffeqsolve`.
    - **Events** are evaluated at all substeps, so that the first one to occur inside of
        a window is found. It is then located as Diffrax does it, but within that
        substep.

    Any other one-step method of Diffrax may also be used as the solver, for example
    `Tsit5()`. Then it makes its steps one after the other, and only what comes
    afterwards is done in parallel.

    `Solution.stats` additionally has `num_iterations`, the number of iterations in all
    windows, including those that were rejected; `max_window_iterations`, that of the
    window with the most of them; and `sequential_evaluations`, how many evaluations of
    the vector field, or of its derivative, followed one another. (Of a solver that is
    no Runge--Kutta method, how many steps.)

    !!! info "Memory"

        JAX has to know in advance for how many windows to allocate memory. This takes
        about

        `5 * max_windows * points * (size * (stages + 1) + 1) * itemsize` bytes

        for the trajectory and what is made of it, where `points` is the number of grid
        points in a window (`substeps`, or more if windows are merged), `size` is that
        of the state, `stages` the number of stages if the solver is a Runge--Kutta
        method (or zero), and `itemsize` is 8 in double and 4 in single precision. As on
        a CPU it takes time to touch that memory, pass `diffeqsolve(..., max_steps=...)`
        or `max_windows` if you know how many are needed. In particular, pass
        `max_steps=1` if the whole solve is a single window.

        Furthermore Jacobians are kept for one window at a time: a small multiple of
        `points * size**2 * itemsize` bytes.

    !!! warning

        The differential equation must be one that can be evaluated a second time. That
        excludes `diffrax.UnsafeBrownianPath`.
    """

    max_windows: int | None = eqx.field(default=None, static=True)
    max_window_points: int | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        if self.max_windows is not None:
            check_positive_int(self.max_windows, "DeerAdjoint(max_windows=...)")
        if self.max_window_points is not None:
            check_positive_int(
                self.max_window_points, "DeerAdjoint(max_window_points=...)"
            )

    def loop(
        self,
        *,
        args,
        terms,
        solver,
        stepsize_controller,
        event,
        saveat,
        t0,
        t1,
        dt0,
        max_steps,
        throw,
        init_state,
        passed_solver_state,
        passed_controller_state,
        progress_meter,
    ) -> Any:
        # These are caches and guesses, and not differentiable.
        del passed_solver_state, passed_controller_state
        _check(solver, terms, init_state.y)
        y0, _ = ravel_pytree(init_state.y)
        layout = self._layout(solver, stepsize_controller, event, max_steps, y0)
        if are_known(stepsize_controller):
            known_ts = known_times(
                stepsize_controller,
                init_state.controller_state,
                t0,
                init_state.tnext,
                t1,
                dt0,
                num_steps=min(max_steps or layout.max_steps, layout.max_steps),
                size=layout.max_steps,
            )
        else:
            known_ts = None
        if layout.steps_per_window == 1:
            windows = StepWindows(solver)
        else:
            assert known_ts is not None
            windows = MergedWindows(solver, known_ts, layout.steps_per_window)
        call = call_event(
            args,
            dict(
                terms=terms,
                solver=solver,
                t0=t0,
                t1=t1,
                dt0=dt0,
                saveat=saveat,
                stepsize_controller=stepsize_controller,
                max_steps=max_steps,
            ),
        )

        # First find the solution, without any derivatives...
        find = lambda: record(
            self._loop,
            windows,
            stepsize_controller,
            event,
            call,
            layout.max_windows,
            max_steps,
            init_state,
            terms=terms,
            args=args,
            t0=t0,
            t1=t1,
            dt0=dt0,
            progress_meter=progress_meter,
        )
        recording = without_gradient(find)
        if throw:
            recording = _error_if_full(recording, layout)

        # ...and then whatever follows from it. Nothing is decided a second time.
        if known_ts is None:
            anchors = [t0, t1, *_stepped_to(stepsize_controller)]
            step_t0s = move_with(recording.t0s, anchors)
            step_t1s = move_with(recording.t1s, anchors)
            num_steps = recording.num_windows
        else:
            step_t0s, step_t1s = known_ts[:-1], known_ts[1:]
            num_steps = recording.num_windows * layout.steps_per_window
            made = jnp.arange(layout.max_steps, dtype=jnp.int32) < num_steps
            num_steps = jnp.sum(made & (step_t0s < step_t1s), dtype=jnp.int32)
        last_window = recording.num_windows - 1
        event_substep = last_window * layout.window_size + recording.event_substep
        event_substep = jnp.maximum(event_substep, 0)
        result = recording.final_state.result
        had_event = (result == RESULTS.event_occurred) & (num_steps > 0)
        event_step = event_substep // layout.substeps_per_step
        num_steps = jnp.where(had_event, event_step + 1, num_steps)

        trajectory = _trajectory(
            *(layout, recording, solver, terms, args),
            *(t0, init_state.y, step_t0s, step_t1s, num_steps),
        )
        if event is None:
            tfinal, yfinal = trajectory.t1, trajectory.y1
        else:
            # Not with a `lax.cond`: in a batch, its branches would be transposed with
            # zeros for what they have not computed, and divide by them.
            tfinal, yfinal, event_result = _at_event(
                event, call, recording.event_mask, trajectory, event_substep
            )
            tfinal = jnp.where(had_event, tfinal, trajectory.t1)
            yfinal = jtu.tree_map(
                lambda x, y: jnp.where(had_event, x, y), yfinal, trajectory.y1
            )
            failed = had_event & (event_result != RESULTS.successful)
            result = RESULTS.where(failed, event_result, result)

        def save_all(subsaveat, save_state):
            return save(
                subsaveat,
                save_state,
                trajectory,
                t1,
                tfinal,
                yfinal,
                num_steps,
                layout.substeps_per_step,
                args,
            )

        final_state = dataclasses.replace(
            recording.final_state,
            y=yfinal,
            result=result,
            save_state=jtu.tree_map(
                save_all,
                saveat.subs,
                init_state.save_state,
                is_leaf=_is_subsaveat,
            ),
            solver_state=recording.solver_state,
            controller_state=recording.controller_state,
            event_mask=None if event is None else recording.event_mask,
        )
        if isinstance(windows, MergedWindows):
            final_state = _as_if_not_merged(
                final_state, init_state, stepsize_controller, windows, num_steps
            )
        if saveat.dense:
            final_state = _dense(
                final_state, trajectory, type(solver) is DeerSolver, layout, num_steps
            )
        stats = dict(
            num_iterations=recording.num_iterations,
            max_window_iterations=recording.max_window_iterations,
            sequential_evaluations=recording.sequential_evaluations,
        )
        return final_state, stats

    def _layout(self, solver, controller, event, max_steps, y0) -> _Layout:
        is_deer = type(solver) is DeerSolver
        substeps = solver.substeps if is_deer else 1
        if type(controller) is StepTo:
            max_steps = min(max_steps or len(controller.ts), len(controller.ts) - 1)
        bytes_per_substep = max(y0.size * y0.dtype.itemsize, 1)

        steps_per_window = 1
        if is_deer and are_known(controller):
            if self.max_window_points is not None:
                points = self.max_window_points
            elif substeps == 1 and event is None:
                bytes_per_jacobian = max(y0.size, 1) * bytes_per_substep
                points = min(_MAX_MERGED, _MAX_JACOBIAN_BYTES // bytes_per_jacobian)
            else:
                # The user has chosen a window. Nor should much be solved in vain after
                # an event.
                points = substeps
            steps_per_window = max(points // substeps, 1)
            if max_steps is not None:
                steps_per_window = min(steps_per_window, max_steps)

        window_size = steps_per_window * substeps
        if self.max_windows is None:
            tableau = tableau_of(solver.solver if is_deer else solver)
            stages = 0 if tableau is None else tableau.parts * tableau.stages
            bytes_per_substep *= 1 + stages
            max_substeps = max(_MAX_BYTES // bytes_per_substep, _MIN_SUBSTEPS)
            max_windows = max(max_substeps // window_size, 1)
        else:
            max_windows = self.max_windows
        if max_steps is not None:
            max_windows = min(max_windows, -(-max_steps // steps_per_window))

        if is_deer:
            chunk_size = window_size
        else:
            on_cpu = jax.default_backend() == "cpu"
            chunk_size = _CHUNK_ON_CPUS if on_cpu else _SEQUENTIAL_CHUNK
            chunk_size = min(self.max_window_points or chunk_size, max_windows)
        return _Layout(substeps, steps_per_window, max_windows, chunk_size)


DeerAdjoint.__init__.__doc__ = """**Arguments:**

- `max_windows`: the number of windows to allocate memory for. A positive integer. If
    more are needed then this raises an error, or with `diffeqsolve(..., throw=False)`
    returns `RESULTS.max_steps_reached`. With solvers other than
    [`diffrax_deer.DeerSolver`][], every step is a window. Defaults to
    `diffeqsolve(..., max_steps=...)`, or if that is less to as many as fit into 2 MiB
    or make 4096 grid points, whichever is more.
- `max_window_points`: the number of grid points in a window. A positive integer. Steps
    known in advance are merged until there are that many. Of solvers other than
    [`diffrax_deer.DeerSolver`][], this is the number of steps through which to
    backpropagate at once, by default 128, and on a CPU 16. By default steps are only
    merged with `DeerSolver(substeps=1)` and without an event, up to 16384 of them, or
    fewer if their Jacobians would take more than 64 MiB. Larger windows suit GPUs, and
    smaller ones CPUs.
"""


def _check(solver, terms, y0):
    check_one_step_solver(solver, "diffeqsolve(..., solver=..., adjoint=DeerAdjoint())")
    check_state(y0, "y0")
    is_unsafe = lambda x: isinstance(x, UnsafeBrownianPath)
    if any(map(is_unsafe, jtu.tree_leaves(terms, is_leaf=is_unsafe))):
        raise ValueError(
            "`adjoint=DeerAdjoint()` does not support `UnsafeBrownianPath`, which "
            "cannot be evaluated a second time. Use `VirtualBrownianTree` instead."
        )


def _error_if_full(recording: Recording, layout: _Layout) -> Recording:
    return eqx.error_if(
        recording,
        recording.full,
        f"`DeerAdjoint` has only got memory for {layout.max_windows} windows of "
        f"{layout.window_size} grid points each, and more are needed. Pass a larger "
        "`DeerAdjoint(max_windows=...)`.",
    )


def _is_subsaveat(x):
    return isinstance(x, SubSaveAt)


def _stepped_to(controller: AbstractStepSizeController) -> list[Array]:
    # The times that steps are made to end at, which so may be differentiated.
    if isinstance(controller, ClipStepSizeController):
        ts = [controller.step_ts, controller.jump_ts]
        ts = [x for x in ts if x is not None]
        return [*ts, *_stepped_to(controller.controller)]
    else:
        return []


def _trajectory(
    layout: _Layout,
    recording: Recording,
    solver: AbstractSolver,
    terms: PyTree[AbstractTerm],
    args: PyTree[Any],
    t0: Real[Array, ""],
    y0: PyTree[Array],
    step_t0s: Real[Array, " steps"],
    step_t1s: Real[Array, " steps"],
    num_steps: Int[Array, ""],
) -> Trajectory:
    # What is not used has length zero, and is finite.
    last = jnp.maximum(num_steps, 1) - 1
    is_used = jnp.arange(layout.max_steps, dtype=jnp.int32) < num_steps
    t1 = jnp.where(num_steps == 0, t0, step_t1s[last])
    step_t0s = jnp.where(is_used, step_t0s, t1)
    step_t1s = jnp.where(is_used, step_t1s, t1)
    ts = jax.vmap(lambda t0, t1: uniform_grid(t0, t1, layout.substeps_per_step))(
        step_t0s, step_t1s
    )
    t0s, t1s = ts[:, :-1].reshape(-1), ts[:, 1:].reshape(-1)
    num_substeps = num_steps * layout.substeps_per_step
    join = lambda x: x.reshape(layout.max_substeps, *x.shape[2:])
    ys, ks = join(recording.ys), join(recording.ks)
    flat_y0, _ = ravel_pytree(y0)
    last = jnp.maximum(num_substeps, 1) - 1
    y1 = lax.stop_gradient(jnp.where(num_substeps == 0, flat_y0, ys[last]))
    is_used = jnp.arange(len(ys), dtype=jnp.int32) < num_substeps
    ys = jnp.where(is_used[:, None], ys, y1[None])
    ks = jnp.where(is_used[:, None, None, None], ks, 0)

    def pad(x, value):
        size = layout.num_chunks * layout.chunk_size - len(x)
        return jnp.concatenate([x, jnp.broadcast_to(value, (size, *x.shape[1:]))])

    # The last one may be in use.
    t0s, t1s = pad(t0s, t1), pad(t1s, t1)
    at = Iterate(pad(ys, y1[None]), pad(ks, jnp.zeros_like(ks[:1])))
    is_deer = type(solver) is DeerSolver
    one_step_solver = solver.solver if is_deer else solver
    problem = Discretisation(one_step_solver, terms, args, t0s, t1s, y0)
    at = implicit_solution(
        at,
        problem.window,
        method=solver.method if is_deer else DEER(),
        scan=solver.scan if is_deer else AutoScan(),
        chunks=Chunks(
            layout.num_chunks, layout.chunk_size, -(-num_substeps // layout.chunk_size)
        ),
    )
    return Trajectory(problem, at, num_substeps)


def _at_event(event, call, mask, trajectory, substep):
    interpolation = trajectory.interpolation(substep)
    t0, t1 = interpolation.t0, interpolation.t1
    t, result = event_time(event, call, mask, t0, t1, interpolation)
    return t, interpolation.evaluate(t), result


def _as_if_not_merged(final_state, init_state, controller, windows, num_steps):
    substeps = windows.solver.substeps
    last = jnp.maximum(num_steps, 1) - 1

    def last_step(ys):
        index = (last % windows.steps) * substeps
        return lax.dynamic_slice_in_dim(ys, index, substeps)

    window_state = final_state.solver_state
    solver_state = DeerState(
        t0=windows.ts[last],
        t1=windows.ts[last + 1],
        ys=jtu.tree_map(last_step, window_state.ys),
        num_iterations=window_state.num_iterations,
        sequential_evaluations=window_state.sequential_evaluations,
    )
    solver_state = jtu.tree_map(
        lambda x, y: lax.stop_gradient(jnp.where(num_steps == 0, x, y)),
        init_state.solver_state,
        solver_state,
    )
    controller_state = advance(controller, init_state.controller_state, num_steps)
    return dataclasses.replace(
        final_state,
        solver_state=solver_state,
        controller_state=lax.stop_gradient(controller_state),
        num_steps=num_steps,
        num_accepted_steps=num_steps,
    )


def _dense(final_state, trajectory, is_deer, layout, num_steps):
    substeps = layout.substeps_per_step
    used = layout.max_substeps
    starts = trajectory.problem.t0s[:used:substeps]
    ts = jnp.append(starts, trajectory.t1)
    index = jnp.arange(len(ts), dtype=jnp.int32)
    ts = jnp.where(index == num_steps, trajectory.t1, ts)
    ts = jnp.where(index <= num_steps, ts, jnp.inf)
    infos = trajectory.problem.outputs(trajectory.at).dense_info
    infos = jtu.tree_map(lambda x: x[:used], infos)
    if is_deer:
        shape = (len(starts), substeps)
        infos = jtu.tree_map(lambda x: x.reshape(*shape, *x.shape[1:]), infos)
        infos = dict(dense_infos=infos)
    return dataclasses.replace(
        final_state, dense_ts=ts, dense_infos=infos, dense_save_index=num_steps
    )
