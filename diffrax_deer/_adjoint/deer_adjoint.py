import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import (
    AbstractAdjoint,
    AbstractProgressMeter,
    AbstractSolver,
    AbstractStepSizeController,
    Event,
    RESULTS,
    SaveAt,
    StepTo,
    SubSaveAt,
    UnsafeBrownianPath,
)
from jaxtyping import Array, Int

from .._checks import check_one_step_solver, check_optional_int, check_state
from .._custom_types import Args, RealScalarLike, Terms
from .._failure import error_if_any, NONFINITE, TOO_MANY_ITERATIONS
from .._grid import AdaptiveGrid
from .._implicit import differentiates_in_turn, share_read, without_gradient
from .._solver import DeerSolver
from .._window import Discretisation, has_tree, leaves_read, ravel, Scheme
from .event import event_time
from .loop import Layout, record, Recording
from .save import save
from .stepper import (
    AbstractStepper,
    KnownSteps,
    MergedWindows,
    SequentialSteps,
    Windows,
)
from .times import (
    anchors,
    are_known,
    ChosenTimes,
    KnownTimes,
    last_of,
    SubstepTimes,
)
from .trajectory import solution, Substeps, System, Trajectory


# By default, keep up to this many bytes of substeps, or if that is more, up to this
# many of them. And if any number of steps is allowed, expect this many.
_MAX_BYTES = 2**24
_MIN_SUBSTEPS = 2**12
_STEPS_IF_ANY = 2**14
# Up to this many bytes are kept even if they could be found again.
_FEW_BYTES = 2**20
# By default, merge up to this many substeps, but keep their Jacobians below this many
# bytes. On a CPU, where those that are not used are made as well, only a few, or more
# if there is a Brownian tree, which is gone down once for each window.
_MAX_MERGED = 2**14
_MAX_JACOBIAN_BYTES = 2**26
_MAX_MERGED_ON_CPU = 32
_MAX_MERGED_WITH_TREE = 256
# Of a sequential solver, how many steps are differentiated at once if the vector field
# looks things up (after each of these, derivatives with respect to all that it could
# have read are added up), or if controls of many steps are evaluated at once. With more
# of them that costs less, but more of the last ones may be made in vain.
_CHUNK_AT_ONCE = 64

_DIAGNOSE = (
    "What to change, `diffrax_deer.diagnose` says: it takes the same arguments as "
    "`diffeqsolve`."
)


class DeerAdjoint(AbstractAdjoint):
    r"""Saves, backpropagates, and looks for events, in parallel over time.

    For use with [`diffrax_deer.DeerSolver`][], as
    `diffeqsolve(..., adjoint=DeerAdjoint())`. It first runs Diffrax's loop over the
    steps, in which it only keeps the trajectory. What is asked for follows from that:

    - **Saving.** All of `SaveAt(ts=...)` is interpolated in one batch. (Diffrax itself
        saves these points one after the other. On a CPU, unless steps are merged, they
        are saved on the way, too, but many of them up to 32 at a time.)
        The functions of `SaveAt(fn=...)` are batched with `jax.vmap`.
    - **Derivatives** are those of the discretised equation, as with
        `diffrax.RecursiveCheckpointAdjoint`. They are given by the implicit function
        theorem: backwards through each window goes one linear recurrence, evaluated in
        parallel, and no iteration is made again. (On a CPU, see below.) Forward mode
        and higher derivatives work as well, and so do derivatives with respect to `t0`,
        `t1`, the save times, `StepTo(ts=...)`, and `ClipStepSizeController(step_ts=...,
        jump_ts=...)`. All other times that an adaptive step size controller has chosen
        are treated as constants. There is none with respect to `solver_state`,
        `controller_state` and what the controller itself consists of.
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

    !!! info "Cost"

        Time goes with the steps that are made, and not with those that are allowed. How
        derivatives are found is chosen by the platform and the solver:

        - On a CPU, with an explicit solver, nothing is kept but the values at which
            some of the steps begin. Backwards, a few steps at a time are made again,
            and differentiated one after the other, as a sequential computation is.
            (If the vector field reads only a small part of what it depends on, as when
            it interpolates a long table, then they are differentiated with respect to
            this all at once.) What this allocates for each window that is allowed, is
            about

            `2 * (size + 2) * itemsize` bytes

            where `size` is that of the state, and `itemsize` is 8 in double and 4 in
            single precision.
        - On a CPU, with a [`diffrax_deer.DeerSolver`][] that solves one implicit
            substep after the other, nothing is kept but the values at which windows
            begin. Backwards, the substeps of one window at a time are solved for again.
            If all that is allowed fits into 1 MiB, then it is kept.
        - Otherwise, and if `SaveAt(steps=...)` or `SaveAt(dense=True)` ask for all of
            it, the whole trajectory is kept, so that nothing is solved a second time.
            Of each window, one after the other, the linearised equations are then
            solved in parallel. This takes about

            `3 * points * (size * (stages + 2) + 1) * itemsize` bytes

            for each window that is allowed, where `points` is the number of grid points
            in a window (`substeps`, or more if windows are merged), and `stages` the
            number of stages if the solver is a Runge--Kutta method (or zero).
            Furthermore Jacobians are kept for one window at a time: a small multiple of
            `points * size**2 * itemsize` bytes.

        `diffeqsolve(..., max_steps=...)` and `max_windows` say how many are allowed.

    !!! warning

        The differential equation must be one that can be evaluated a second time. That
        excludes `diffrax.UnsafeBrownianPath`.
    """

    max_windows: int | None = eqx.field(default=None, static=True)
    max_window_points: int | None = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        check_optional_int(self.max_windows, "DeerAdjoint(max_windows=...)")
        check_optional_int(self.max_window_points, "DeerAdjoint(max_window_points=...)")

    # Diffrax calls the method of whatever it is given. Of `adjoint=DeerAdjoint`, which
    # is easily written, Python would only say that `self` is missing.
    def loop(
        self: Any = None,
        *,
        args: Args,
        terms: Terms,
        solver: AbstractSolver[Any],
        stepsize_controller: AbstractStepSizeController[Any, Any],
        event: Event | None,
        saveat: SaveAt,
        t0: Array,
        t1: Array,
        dt0: RealScalarLike | None,
        max_steps: int | None,
        throw: bool,
        init_state: Any,
        passed_solver_state: bool,
        passed_controller_state: bool,
        progress_meter: AbstractProgressMeter[Any],
    ) -> Any:
        if self is None:
            raise TypeError(
                "`diffeqsolve(..., adjoint=...)` must be an instance, got the class "
                "`DeerAdjoint`. Did you mean `DeerAdjoint()`?"
            )
        # These are caches and guesses, and not differentiable.
        del passed_solver_state, passed_controller_state
        _check(solver, terms, init_state)
        y0 = init_state.y
        of_first = terms, t0, init_state.tnext, y0, args
        if type(solver) is DeerSolver:
            one_step_solver, reads = solver.solver, solver.leaves_read(*of_first)
            solver.check_solver_state(init_state.solver_state, y0, reads)
            sharding = solver.sharding
        else:
            one_step_solver, reads = solver, leaves_read(solver, *of_first)
            sharding = None
        scheme = Scheme(one_step_solver, terms, args, y0, reads)
        if are_known(stepsize_controller):
            times = KnownTimes(
                *(stepsize_controller, init_state.controller_state),
                *(t0, init_state.tnext, t1, dt0, max_steps),
            )
        else:
            times = None
        y0 = ravel(y0, y0)
        # Then those not kept are made again for their derivatives...
        is_made = differentiates_in_turn(scheme.is_explicit, sharding)
        has_table = is_made and _has_table(scheme, t0, init_state.tnext)
        stepper = self._stepper(
            *(solver, stepsize_controller, times, event, max_steps, scheme.read(y0)),
            *(has_tree(terms), has_table),
        )
        # ...and then they are solved for again, if there may be many of them.
        is_solved = (
            type(solver) is DeerSolver
            and jax.default_backend() == "cpu"
            and sharding is None
            and not is_made
            and solver.guess.is_sequential(
                dataclasses.replace(solver, substeps=stepper.size).uniform_problem(
                    *of_first, reads
                )
            )
        )
        layout = self._layout(
            *(stepper, stepsize_controller, scheme, saveat, y0, max_steps),
            *(is_made, is_solved),
        )
        is_kept = layout.keeps_all and not is_made
        # As Diffrax calls the functions of an event.
        call = lambda cond_fn, t, y: cond_fn(
            *(t, y, args),
            terms=terms,
            solver=solver,
            t0=t0,
            t1=t1,
            dt0=dt0,
            saveat=saveat,
            stepsize_controller=stepsize_controller,
            max_steps=max_steps,
        )

        # First find the solution, without any derivatives...
        recording, final_state = without_gradient(
            lambda: record(
                *(stepper, scheme, event, call, layout, init_state),
                max_steps=max_steps,
                t0=t0,
                t1=t1,
                progress_meter=progress_meter,
            )
        )
        if throw:
            recording, final_state = _error_if_failed(
                *(recording, final_state, layout, solver, y0, stepsize_controller)
            )

        # ...and then whatever follows from it. Nothing is decided a second time.
        if times is None:
            fixed = [t0, t1, *anchors(stepsize_controller)]
            times = ChosenTimes(recording.t0s, recording.t1s, fixed)
        num_steps = _num_steps(stepper, recording)
        substeps = Substeps(
            _num_substeps(stepper, recording, num_steps),
            recording.kept,
            layout.keeps_all,
            layout.chunk,
        )
        substep_times = SubstepTimes(times, recording.fractions, stepper.substeps)
        linearisation = None if is_made and not has_table else stepper.linearisation
        system = System(scheme, substep_times, substeps, is_kept, linearisation)
        trajectory = Trajectory(
            *(system, solution(recording.values, system), jnp.asarray(t0)),
            *(recording.last_ts, final_state.y, recording.points),
        )
        tfinal, yfinal, result = trajectory.t1, trajectory.y1, final_state.result
        if event is not None:
            tfinal, yfinal, result = _at_event(
                event, call, recording, trajectory, final_state.result
            )

        def save_all(subsaveat, save_state):
            return save(
                *(subsaveat, save_state, trajectory, t1, tfinal, yfinal),
                *(num_steps, args),
            )

        final_state = stepper.end(init_state, final_state, num_steps)
        final_state = dataclasses.replace(
            final_state,
            y=yfinal,
            result=result,
            save_state=jtu.tree_map(
                save_all, saveat.subs, init_state.save_state, is_leaf=_is_subsaveat
            ),
            event_mask=None if event is None else recording.event_mask,
        )
        if saveat.dense:
            final_state = _dense(
                final_state, trajectory, stepper, num_steps, recording.had_event
            )
        stats = dict(
            num_iterations=recording.num_iterations,
            max_window_iterations=recording.max_window_iterations,
            sequential_evaluations=recording.span,
        )
        return final_state, stats

    def _stepper(
        self, solver, controller, times, event, max_steps, y0, has_tree, has_table
    ):
        if type(solver) is not DeerSolver:
            chunk = self.max_window_points
            known = times if event is None and has_tree else None
            if chunk is None and (known is not None or has_table):
                chunk = _CHUNK_AT_ONCE
            if known is None:
                return SequentialSteps(solver, controller, chunk)
            return KnownSteps(solver, controller, chunk, known)
        elif times is None or not solver.grid.is_uniform or solver.sharding is not None:
            return Windows(solver, controller)
        substeps = solver.substeps
        if self.max_window_points is not None:
            points = self.max_window_points
        elif substeps > 1 or event is not None:
            # The user has chosen a window. Nor should much be solved in vain after an
            # event.
            points = substeps
        elif jax.default_backend() == "cpu":
            points = _MAX_MERGED_WITH_TREE if has_tree else _MAX_MERGED_ON_CPU
        else:
            bytes_per_jacobian = max(y0.size, 1) ** 2 * y0.dtype.itemsize
            points = min(_MAX_MERGED, _MAX_JACOBIAN_BYTES // bytes_per_jacobian)
        steps = max(points // substeps, 1)
        steps = steps if max_steps is None else min(steps, max_steps)
        if steps == 1:
            return Windows(solver, controller)
        return MergedWindows(solver, times, steps)

    def _layout(
        self, stepper, controller, scheme, saveat, y0, max_steps, is_made, is_solved
    ) -> Layout:
        # Only what is asked for is kept, unless that is everything.
        subs = jtu.tree_leaves(saveat.subs, is_leaf=_is_subsaveat)
        is_asked_for = saveat.dense or any(sub.steps > 0 for sub in subs)
        keeps_all = is_asked_for or not (is_made or is_solved)
        ts = [sub.ts for sub in subs if sub.ts is not None]
        if len(ts) == 0 or jax.default_backend() != "cpu":
            ts = jnp.zeros(0)
        else:
            ts = ts[0] if len(ts) == 1 else jnp.sort(jnp.concatenate(ts))

        if isinstance(controller, StepTo):
            num_steps = len(controller.ts) - 1
            max_steps = num_steps if max_steps is None else min(max_steps, num_steps)
        max_windows = self.max_windows
        parts, stages = scheme.stage_shape
        bytes_per_start = max(y0.size * y0.dtype.itemsize, 1)
        bytes_per_substep = bytes_per_start * (2 + parts * stages)
        if max_windows is None:
            needed = bytes_per_substep if keeps_all else bytes_per_start
            max_substeps = max(_MAX_BYTES // needed, _MIN_SUBSTEPS)
            max_windows = max(max_substeps // stepper.size, 1)
            max_steps = _STEPS_IF_ANY if max_steps is None else max_steps
        if max_steps is not None:
            max_windows = min(max_windows, -(-max_steps // stepper.steps))
        is_small = max_windows * stepper.size * bytes_per_substep <= _FEW_BYTES
        # Then it takes less time to keep them than to solve for them again.
        keeps_all = keeps_all or (is_solved and is_small)
        chunk = stepper.chunk(scheme, max_windows)
        return Layout(max_windows, stepper.size, chunk, keeps_all, ts)


DeerAdjoint.__init__.__doc__ = """**Arguments:**

- `max_windows`: the number of windows to allocate memory for. A positive integer. If
    more are needed then this raises an error, or with `diffeqsolve(..., throw=False)`
    returns `RESULTS.max_steps_reached`. With solvers other than
    [`diffrax_deer.DeerSolver`][], every step is a window. Defaults to
    `diffeqsolve(..., max_steps=...)` (or 16384 steps if that is `None`), or if that is
    less to as many as fit into 16 MiB or make 4096 grid points, whichever is more.
- `max_window_points`: the number of grid points in a window. A positive integer. Steps
    known in advance are merged until there are that many. (Not with
    [`diffrax_deer.AdaptiveGrid`][], whose windows have grids of their own.) Of solvers
    other than [`diffrax_deer.DeerSolver`][], this is the number of steps through which
    to backpropagate at once: by default 128, and on a CPU as many as have 24 stages. It
    is 64 if steps are known in advance and there is a `diffrax.VirtualBrownianTree`, or
    on a CPU if the vector field looks things up in long tables. By default steps are
    only merged with `DeerSolver(substeps=1)` and without an event, up to 16384 of them,
    or fewer if their Jacobians would take more than 64 MiB, and on a CPU up to 32, or
    256 if there is a `diffrax.VirtualBrownianTree`.
"""


def _check(solver, terms, init_state):
    check_one_step_solver(solver, "diffeqsolve(..., solver=..., adjoint=DeerAdjoint())")
    check_state(init_state.y, "y0")
    is_unsafe = lambda x: isinstance(x, UnsafeBrownianPath)
    if any(map(is_unsafe, jtu.tree_leaves(terms, is_leaf=is_unsafe))):
        raise ValueError(
            "`adjoint=DeerAdjoint()` does not support `UnsafeBrownianPath`, which "
            "cannot be evaluated a second time. Use `VirtualBrownianTree` instead."
        )


def _has_table(scheme: Scheme, t0: Array, t1: Array) -> bool:
    window = Discretisation(scheme, t0[None], t1[None]).window
    # Anything may turn out to be differentiated.
    return share_read(window, window) < 1


def _error_if_failed(
    recording: Recording, final_state, layout: Layout, solver, y0, stepsize_controller
):
    """What Diffrax would report in words that are about other things."""
    result = final_state.result
    errors = [
        (
            jnp.invert(jnp.all(jnp.isfinite(y0))),
            "`diffeqsolve(..., y0=...)` is not finite (inf or NaN).",
        ),
        (
            recording.is_full,
            f"`DeerAdjoint` has only got memory for {layout.max_windows} windows of "
            f"{layout.window_size} grid points each, and more are needed. Pass a "
            "larger `DeerAdjoint(max_windows=...)`.",
        ),
    ]
    if type(solver) is DeerSolver:
        max_iters = solver.max_iters
        limit = "all" if max_iters is None else f"`max_iters={max_iters}`"
        errors += [
            (
                result == TOO_MANY_ITERATIONS,
                f"A window of `DeerSolver`, of {layout.window_size} substeps, has not "
                f"converged within {limit} iterations. Use shorter windows (a smaller "
                "`dt0`, with as many fewer `substeps`, or with as many if the wrapped "
                "solver is implicit), or an adaptive step size controller, which finds "
                f"out how long they may be. {_DIAGNOSE}",
            ),
            (
                result == NONFINITE,
                f"A window of `DeerSolver`, of {layout.window_size} substeps, has got "
                "nonfinite values (inf or NaN). Either the vector field returns them, "
                "or the solution does not exist for as long, or the wrapped solver is "
                "unstable at this step size, as an explicit one is for a stiff "
                f"problem. {_DIAGNOSE}",
            ),
        ]
        has_tolerance = isinstance(solver.grid, AdaptiveGrid) and (
            solver.grid.rtol is not None
        )
        if has_tolerance and are_known(stepsize_controller):
            errors += [
                (
                    result == RESULTS.dt_min_reached,
                    f"A window of `DeerSolver`, of {layout.window_size} substeps, is "
                    "less accurate than `AdaptiveGrid(rtol=..., atol=...)` asks for. "
                    "Use more `substeps`: as many as `diagnose` says, or "
                    "`solver_state.required_substeps` with `SaveAt(solver_state=True)` "
                    "and `throw=False`.",
                )
            ]
    # Not of all that has been recorded, which would be copied. All that is returned
    # depends on one of these.
    number, y = error_if_any((recording.num_windows, final_state.y), errors)
    recording = eqx.tree_at(lambda r: r.num_windows, recording, number)
    return recording, dataclasses.replace(final_state, y=y)


def _is_subsaveat(x):
    return isinstance(x, SubSaveAt)


def _num_steps(stepper: AbstractStepper, recording: Recording) -> Int[Array, ""]:
    """How many steps have been made, until the event if there was one."""
    before = stepper.steps * (recording.num_windows - 1)
    made = stepper.num_steps(recording.num_windows)
    until_event = before + recording.event_substep // stepper.substeps + 1
    return jnp.where(recording.had_event, until_event, made)


def _num_substeps(stepper, recording, num_steps) -> Int[Array, ""]:
    before = stepper.size * (recording.num_windows - 1)
    until_event = before + recording.event_substep + 1
    made = num_steps * stepper.substeps
    return jnp.where(recording.had_event, until_event, made)


def _at_event(event, call, recording, trajectory, result):
    # Not with a `lax.cond`: in a batch, its branches would be transposed with zeros for
    # what they have not computed, and divide by them.
    had_event, interpolation = recording.had_event, trajectory.at_last()
    t0, t1 = interpolation.t0, interpolation.t1
    mask = recording.event_mask
    t, event_result = event_time(event, call, mask, t0, t1, interpolation)
    select = lambda x, y: jtu.tree_map(lambda x, y: jnp.where(had_event, x, y), x, y)
    failed = had_event & (event_result != RESULTS.successful)
    return (
        select(t, trajectory.t1),
        select(interpolation.evaluate(t), trajectory.y1),
        RESULTS.where(failed, event_result, result),
    )


def _dense(final_state, trajectory, stepper, num_steps, had_event):
    system = trajectory.system
    # Substeps after an event are missing, but are a part of the last window.
    _, end_of_window = system.times.times(last_of(num_steps))
    end = jnp.where(had_event, end_of_window, trajectory.t1)
    starts, _ = system.of_substeps(system.substeps.kept[:: stepper.substeps])
    index = jnp.arange(len(starts) + 1, dtype=jnp.int32)
    ts = jnp.where(index < num_steps, jnp.append(starts, end), jnp.inf)
    ts = jnp.where(index == num_steps, end, ts)
    return dataclasses.replace(
        final_state,
        dense_ts=ts,
        dense_infos=stepper.grouped(trajectory.dense_infos(), system.times.fractions),
        dense_save_index=num_steps,
    )
