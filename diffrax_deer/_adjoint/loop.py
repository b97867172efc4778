"""Diffrax's loop over the steps, of which only what is needed later is kept.

This module alone knows what the state of that loop consists of. It does not call that
loop, as that saves one point after the other, and keeps nothing of what goes on inside
of a step.
"""

import dataclasses
import functools as ft
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import is_okay, is_successful, RESULTS
from jaxtyping import Array, Bool, Int, Real

from .._custom_types import PyTree, RealScalarLike
from .._time_axis import at_index, before
from .._window import Iterate, Scheme
from .event import event_values, first_crossing
from .stepper import AbstractStepper, Made
from .times import almost
from .trajectory import Points, Rows, Values


# On the way, up to how many points are saved at once, and up to how many numbers these
# are. Never more than there would be in each of so few steps.
_SAVED_AT_ONCE = 32
_SAVED_NUMBERS = 2**13
_FEW_STEPS = 64


class Layout(eqx.Module):
    """How much memory there is for what.

    **Attributes:**

    - `max_windows`: that is, windows that were accepted.
    - `window_size`: how many substeps each of them has.
    - `chunk`: how many substeps are differentiated at once.
    - `keeps_all`: whether all substeps are kept, or only those that are asked for.
    - `ts`: at which times the solution is asked for, in order. None of them if there is
        nothing to be done about it on the way.
    """

    max_windows: int = eqx.field(static=True)
    window_size: int = eqx.field(static=True)
    chunk: int = eqx.field(static=True)
    keeps_all: bool = eqx.field(static=True)
    ts: Real[Array, " points"]

    @property
    def max_substeps(self) -> int:
        return self.max_windows * self.window_size

    @property
    def max_chunks(self) -> int:
        return -(-self.max_substeps // self.chunk)

    @property
    def max_kept(self) -> int:
        if self.keeps_all:
            return self.max_chunks * self.chunk
        else:
            # At least one, as arrays of none take special care.
            return min(max(len(self.ts), 1), self.max_substeps)


class Recording(eqx.Module):
    """What has been kept of all windows that were accepted.

    **Attributes:**

    - `t0s`, `t1s`: when each of the windows begins and ends.
    - `fractions`: when their substeps do. `None` if these are equally long.
    - `values`: of their solution.
    - `kept`: which substeps these are about.
    - `last_ts`: when the last substep, as in `values`, begins and ends.
    - `points`: the solution at the save times, if it is saved on the way.
    - `event_substep`: in the last window, that in which an event has occurred.
    """

    t0s: Real[Array, " windows"]
    t1s: Real[Array, " windows"]
    fractions: Real[Array, "windows size_plus_1"] | None
    values: Values
    kept: Int[Array, " kept"]
    last_ts: tuple[Real[Array, ""], Real[Array, ""]]
    points: Points | None
    event_substep: Int[Array, ""]
    num_windows: Int[Array, ""]
    num_kept: Int[Array, ""]
    num_points: Int[Array, ""]
    # More windows would have been needed than there is memory for.
    is_full: Bool[Array, ""]
    had_event: Bool[Array, ""]
    event_mask: PyTree[Bool[Array, ""]]
    num_iterations: Int[Array, ""]
    max_window_iterations: Int[Array, ""]
    span: Int[Array, ""]


class _State(eqx.Module):
    # As in Diffrax.
    y: PyTree[Array]
    tprev: Real[Array, ""]
    tnext: Real[Array, ""]
    made_jump: Any
    solver_state: PyTree[Any]
    controller_state: PyTree[Any]
    result: RESULTS
    num_steps: Int[Array, ""]
    num_accepted_steps: Int[Array, ""]
    progress_meter_state: PyTree[Array]
    event_values: Any
    # And what is ours.
    recording: Recording


def record(
    stepper: AbstractStepper,
    scheme: Scheme,
    event: Any,
    call_event: Callable,
    layout: Layout,
    init_state: Any,
    *,
    max_steps: int | None,
    t0: RealScalarLike,
    t1: RealScalarLike,
    progress_meter: Any,
) -> tuple[Recording, Any]:
    """Makes all windows. `init_state` is what Diffrax begins with. Returned is what its
    loop would have ended with as well, if every window was a step."""
    controller = stepper.chosen_by
    solver_state, controller_state, tnext = stepper.init(
        *(scheme, init_state.solver_state, init_state.controller_state),
        init_state.tnext,
    )
    max_windows = None if max_steps is None else -(-max_steps // stepper.steps)
    error_order = stepper.solver.error_order(scheme.terms)

    def is_unfinished(state):
        return (state.tprev < t1) & is_successful(state.result)

    def step(state: _State) -> _State:
        recording = state.recording
        index = recording.num_windows
        made_jump = False if never_jumps else state.made_jump
        made = stepper.make(
            *(scheme, index, state.tprev, state.tnext, state.y),
            *(state.solver_state, made_jump),
        )
        y_error = jtu.tree_map(
            lambda x: jnp.where(jnp.isnan(x), jnp.inf, x), made.y_error
        )
        keep, tprev, tnext, made_jump, controller_state, result = (
            controller.adapt_step_size(
                *(state.tprev, state.tnext, state.y, made.y1, scheme.args),
                *(y_error, error_order, state.controller_state),
            )
        )
        tprev = jnp.minimum(tprev, t1)
        end = jnp.where(keep, t1, tprev + 0.5 * (t1 - tprev))
        tnext = jnp.where(tnext > almost(t1), end, tnext)
        made_jump = jnp.where(keep, made_jump, state.made_jump)

        # The first failure counts. A window that failed ends the solve, even if it has
        # been accepted.
        is_good = keep & (made.result == RESULTS.successful)
        solver_result = RESULTS.where(keep, made.result, RESULTS.successful)
        result = RESULTS.where(is_okay(solver_result), result, solver_result)
        is_good = jnp.asarray(is_good)

        substep = jnp.array(stepper.size - 1, jnp.int32)
        new_event_values = None
        if event is not None:
            values = jax.vmap(lambda t, y: event_values(event, call_event, t, y))(
                made.t1s, scheme.unravel_all(made.at.ys)
            )
            occurred, event_substep, mask = first_crossing(
                event, state.event_values, values
            )
            new_event_values = [x[-1] for x in values]
            occurred = is_good & occurred
            substep = jnp.where(occurred, event_substep, substep)
            recording = _replace(recording, had_event=occurred, event_mask=mask)
        recording = _keep(recording, layout, is_good, scheme, state.y, made, substep)
        if max_windows is None or layout.max_windows < max_windows:
            is_full = (recording.num_windows >= layout.max_windows) & (tprev < t1)
            is_full = is_full & jnp.invert(recording.had_event)
            recording = _replace(recording, is_full=is_full)
        result = RESULTS.where(
            is_okay(result) & recording.is_full, RESULTS.max_steps_reached, result
        )
        result = RESULTS.where(
            is_okay(result) & recording.had_event, RESULTS.event_occurred, result
        )

        select = lambda x, y: jtu.tree_map(lambda x, y: jnp.where(keep, x, y), x, y)
        done = (tprev - t0) / jnp.where(t0 == t1, 1, t1 - t0)
        return _State(
            y=jtu.tree_map(lambda x, y: jnp.where(is_good, x, y), made.y1, state.y),
            tprev=tprev,
            tnext=tnext,
            made_jump=made_jump,
            solver_state=select(made.solver_state, state.solver_state),
            controller_state=controller_state,
            result=result,
            num_steps=state.num_steps + 1,
            num_accepted_steps=state.num_accepted_steps + jnp.where(keep, 1, 0),
            progress_meter_state=progress_meter.step(state.progress_meter_state, done),
            event_values=select(new_event_values, state.event_values),
            recording=recording,
        )

    zero = jnp.array(0, jnp.int32)
    if event is None:
        first_event_values = None
    else:
        first_event_values = event_values(
            event, call_event, init_state.tprev, init_state.y
        )
    first_made_jump = _made_jump(
        controller, controller_state, error_order, scheme, init_state
    )
    # The loop makes an array of it.
    never_jumps = first_made_jump is False
    state = _State(
        y=init_state.y,
        tprev=jnp.asarray(init_state.tprev),
        tnext=jnp.asarray(tnext),
        made_jump=jnp.asarray(first_made_jump),
        solver_state=solver_state,
        controller_state=controller_state,
        result=init_state.result,
        num_steps=zero,
        num_accepted_steps=zero,
        progress_meter_state=init_state.progress_meter_state,
        event_values=first_event_values,
        recording=_nothing(layout, scheme, init_state, stepper),
    )
    state = eqxi.while_loop(
        is_unfinished,
        step,
        state,
        max_steps=max_windows,
        buffers=lambda s: _buffers(s.recording),
        # With a single step this is no loop at all, which is quicker to compile.
        kind="bounded" if max_windows == 1 else "lax",
    )
    result = RESULTS.where(
        is_unfinished(state), RESULTS.max_steps_reached, state.result
    )
    final_state = dataclasses.replace(
        init_state,
        y=state.y,
        tprev=state.tprev,
        tnext=state.tnext,
        made_jump=state.made_jump,
        solver_state=state.solver_state,
        controller_state=state.controller_state,
        result=result,
        num_steps=state.num_steps,
        num_accepted_steps=state.num_accepted_steps,
        num_rejected_steps=state.num_steps - state.num_accepted_steps,
        progress_meter_state=state.progress_meter_state,
    )
    return state.recording, final_state


def _made_jump(controller, controller_state, error_order, scheme, init_state):
    # Most controllers know that they never jump. Then solvers need not provide for it.
    t, y = init_state.tprev, init_state.y
    *_, made_jump, _, _ = eqx.filter_eval_shape(
        *(controller.adapt_step_size, t, t, y, y, scheme.args, y, error_order),
        controller_state,
    )
    if made_jump is False and init_state.made_jump is False:
        return False
    return jnp.asarray(init_state.made_jump)


def _nothing(layout, scheme, init_state, stepper) -> Recording:
    t, y = jnp.asarray(init_state.tprev), scheme.ravel(init_state.y)
    zero, false = jnp.array(0, jnp.int32), jnp.array(False)
    ts = jnp.zeros(layout.max_windows, t.dtype)
    if stepper.is_uniform:
        fractions = None
    else:
        fractions = jnp.zeros((layout.max_windows, layout.window_size + 1), t.dtype)
    rows = lambda *shape: jnp.zeros((*shape, y.size), y.dtype)
    kept, stages = layout.max_kept, scheme.stage_shape
    if len(layout.ts) == 0 or stepper.steps > 1:
        points = None
    else:
        per_row = _saved_at_once(len(layout.ts), y.size)
        ys = jnp.broadcast_to(y, (-(-len(layout.ts) // per_row), per_row, y.size))
        points = Points(layout.ts, ys, zero)
    values = Values(
        chunks=rows(layout.max_chunks),
        kept=Rows(rows(kept), Iterate(rows(kept), rows(kept, *stages))),
        last=Rows(y, Iterate(y, rows(*stages))),
    )
    return Recording(
        t0s=ts,
        t1s=ts,
        fractions=fractions,
        values=values,
        kept=jnp.full(kept, layout.max_substeps, jnp.int32),
        last_ts=(t, t),
        points=points,
        event_substep=zero,
        num_windows=zero,
        num_kept=zero,
        num_points=zero,
        is_full=false,
        had_event=false,
        event_mask=init_state.event_mask,
        num_iterations=zero,
        max_window_iterations=zero,
        span=zero,
    )


def _buffers(recording):
    values, points = recording.values, recording.points
    times = recording.t0s, recording.t1s, recording.fractions
    ys = None if points is None else points.ys
    return *times, values.chunks, values.kept, recording.kept, ys


def _keep(
    recording: Recording, layout: Layout, is_good, scheme, y0, made: Made, substep
) -> Recording:
    """Keeps what is needed of a window, if it is good."""
    set_at = lambda x, i, value: eqxi.buffer_at_set(x, i, value, pred=is_good)
    choose = lambda new, old: jnp.where(is_good, new, old)
    window, size = recording.num_windows, layout.window_size
    first = window * size
    of_all = first + jnp.arange(size, dtype=jnp.int32)
    starts = before(made.at.ys, scheme.ravel(y0))
    rows, values = Rows(starts, made.at), recording.values
    num_kept, num_points = recording.num_kept, recording.num_points
    points = recording.points
    if points is not None:
        points = _save_points(points, is_good, scheme, made)
    if layout.keeps_all:
        # Of a single window there is no place to be looked for.
        index = slice(None) if layout.max_windows == 1 else of_all
    elif len(layout.ts) == 0:
        index = jnp.full(size, layout.max_kept, jnp.int32)
    else:
        # Which substeps are those that the points lie in.
        if points is None or size > 1:
            ends = jax.vmap(ft.partial(_count, layout.ts))(made.t1s)
        else:
            ends = points.number[None]
        is_kept = jnp.diff(ends, prepend=num_points) > 0
        index = num_kept + jnp.cumsum(is_kept, dtype=jnp.int32) - 1
        num_kept = jnp.where(is_good, jnp.max(index) + 1, num_kept)
        index = jnp.where(is_kept, index, layout.max_kept)
        num_points = jnp.where(is_good, ends[-1], num_points)
    # Windows consist of whole chunks, or chunks of whole windows.
    chunk = jnp.where(
        first % layout.chunk == 0, first // layout.chunk, layout.max_chunks
    )
    # Not by `__init__`, as inside of a loop these are no arrays.
    values = eqx.tree_at(
        lambda values: (values.chunks, values.kept, values.last),
        values,
        (
            set_at(values.chunks, chunk, starts[0]),
            jtu.tree_map(lambda row, x: set_at(x, index, row), rows, values.kept),
            jtu.tree_map(
                lambda row, x: choose(at_index(row, substep), x), rows, values.last
            ),
        ),
    )
    iterations = recording.num_iterations + made.num_iterations
    most = jnp.maximum(recording.max_window_iterations, made.num_iterations)
    new = dict(
        t0s=set_at(recording.t0s, window, made.t0s[0]),
        t1s=set_at(recording.t1s, window, made.t1s[-1]),
        values=values,
        kept=set_at(recording.kept, index, of_all),
        last_ts=jtu.tree_map(
            lambda row, x: choose(at_index(row, substep), x),
            *((made.t0s, made.t1s), recording.last_ts),
        ),
        event_substep=substep,
        num_windows=window + jnp.where(is_good, 1, 0).astype(jnp.int32),
        num_kept=num_kept,
        num_points=num_points,
        num_iterations=iterations,
        max_window_iterations=most,
        span=recording.span + made.span,
    )
    if points is not None:
        recording = eqx.tree_at(lambda r: r.points, recording, points)
    if made.fractions is not None:
        new["fractions"] = set_at(recording.fractions, window, made.fractions)
    return _replace(recording, **new)


def _saved_at_once(number: int, size: int) -> int:
    most = min(_SAVED_AT_ONCE, _SAVED_NUMBERS // max(size, 1))
    return max(min(most, number // _FEW_STEPS), 1)


def _save_points(points: Points, is_good, scheme: Scheme, made: Made) -> Points:
    """Saves all that lie in a window, a row at a time. On a CPU this takes less time
    than to save all of them in the end, as what they are interpolated from is at hand.
    """
    interpolation, t1 = made.interpolation, made.t1s[-1]
    assert interpolation is not None
    per_row = points.ys.shape[1]
    padding = (0, math.prod(points.ys.shape[:2]) - len(points.ts))
    ts = jnp.pad(points.ts, padding, constant_values=jnp.inf)

    def goes_on(carry):
        _, i = carry
        return is_good & (i < len(ts)) & (ts[i] <= t1)

    def body(carry):
        ys, i = carry
        row = i // per_row
        index = row * per_row + jnp.arange(per_row, dtype=jnp.int32)
        here = lax.dynamic_slice_in_dim(ts, row * per_row, per_row)
        is_new = (index >= i) & (here <= t1)
        values = jax.vmap(interpolation.evaluate)(jnp.where(is_new, here, t1))
        values = jnp.where(is_new[:, None], scheme.ravel_all(values, per_row), ys[row])
        return ys.at[row].set(values), i + jnp.sum(is_new, dtype=jnp.int32)

    ys, number = eqxi.while_loop(
        *(goes_on, body, (points.ys, points.number)),
        buffers=lambda carry: carry[0],
        kind="lax",
    )
    return eqx.tree_at(lambda p: (p.ys, p.number), points, (ys, number))


def _count(ts: Real[Array, " points"], t: Real[Array, ""]) -> Int[Array, ""]:
    """How many of these, which are in order, are not later than `t`."""
    # As `jnp.searchsorted`, but two operations on few numbers are quicker than many on
    # one, or one on all.
    rows = math.isqrt(len(ts))
    width = -(-len(ts) // rows)
    ts = jnp.pad(ts, (0, rows * width - len(ts)), constant_values=jnp.inf)
    ts = ts.reshape(rows, width)
    row = jnp.maximum(jnp.sum(ts[:, 0] <= t, dtype=jnp.int32) - 1, 0)
    return row * width + jnp.sum(ts[row] <= t, dtype=jnp.int32)


def _replace(recording: Recording, **fields: Any) -> Recording:
    where = lambda recording: [getattr(recording, name) for name in fields]
    return eqx.tree_at(where, recording, list(fields.values()))
