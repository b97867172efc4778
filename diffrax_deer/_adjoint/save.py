import dataclasses
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import SubSaveAt
from jaxtyping import Array, Real

from .._custom_types import IntScalarLike, PyTree
from .._time_axis import place_in
from .trajectory import Trajectory


def save(
    subsaveat: SubSaveAt,
    save_state: Any,
    trajectory: Trajectory,
    t1: Real[Array, ""],
    tfinal: Real[Array, ""],
    yfinal: PyTree[Array],
    num_steps: IntScalarLike,
    args: PyTree[Any],
) -> Any:
    """All that Diffrax saves, in the order in which it does so, but in one batch.

    `save_state` is what Diffrax has allocated for it. The solution ends at `tfinal`
    with the value `yfinal`: at an event, where it failed, or at the intended end `t1`.
    """
    system, values = trajectory.system, trajectory.values
    t0, scheme = trajectory.t0, system.scheme
    # One item for each kind of thing that is saved: which ones really are, where to,
    # and what.
    saved, indices, ts, ys = [], [], [], []
    num_t0 = int(subsaveat.t0)
    num_ts = num_saved_steps = 0
    ends = None

    if subsaveat.t0:
        saved.append(jnp.ones(1, bool))
        indices.append(jnp.zeros(1, jnp.int32))
        ts.append(t0[None])
        ys.append(scheme.ravel(scheme.y0)[None])

    # Without the last step, which ends with `yfinal`.
    if subsaveat.steps > 0:
        # All substeps are kept.
        all_ys, substeps = values.kept.at.ys, system.times.per_step
        max_steps = len(all_ys) // substeps
        steps = subsaveat.steps * jnp.arange(
            1, -(-max_steps // subsaveat.steps), dtype=jnp.int32
        )
        last = substeps * steps - 1
        is_saved = steps < num_steps
        num_saved_steps = jnp.sum(is_saved, dtype=jnp.int32)
        after, _ = system.of_substeps(last + 1)
        _, ends = system.of_substeps(last)
        ends = jnp.where(is_saved, lax.stop_gradient(ends), jnp.inf)
        index = num_t0 + jnp.arange(len(steps), dtype=jnp.int32)
        if subsaveat.ts is not None:
            index = index + place_in(subsaveat.ts, ends, side="right")
        saved.append(is_saved)
        indices.append(index)
        # If there is a jump between two steps, then Diffrax saves the time after it.
        ts.append(after)
        ys.append(jnp.where(is_saved[:, None], all_ys[last], values.last.at.ys[None]))

    ys = [scheme.unravel_all(y) for y in ys]

    if subsaveat.ts is not None:
        # If nothing is solved then nothing is saved. (An event at the very beginning.)
        is_saved = (subsaveat.ts <= tfinal) & ((num_steps > 0) | (t0 == t1))
        num_ts = jnp.sum(is_saved, dtype=jnp.int32)
        index = num_t0 + jnp.arange(len(subsaveat.ts), dtype=jnp.int32)
        if ends is not None:
            index = index + place_in(ends, subsaveat.ts)
        saved.append(is_saved)
        indices.append(index)
        ts.append(subsaveat.ts)
        # What is not saved must nonetheless be finite.
        at_ts = trajectory.evaluate(jnp.where(is_saved, subsaveat.ts, tfinal))
        ys.append(trajectory.at_points(subsaveat.ts, at_ts))

    if subsaveat.steps > 0:
        is_due = num_steps % subsaveat.steps == 0
        is_saved = jnp.where(is_due, num_steps > 0, subsaveat.t1)
    else:
        is_saved = jnp.array(subsaveat.t1)
    if subsaveat.t1 or subsaveat.steps > 0:
        saved.append(is_saved[None])
        index = jnp.asarray(num_t0 + num_ts + num_saved_steps, jnp.int32)
        indices.append(index[None])
        ts.append(tfinal[None])
        ys.append(jtu.tree_map(lambda y: y[None], yfinal))

    saved, indices, ts = (jnp.concatenate(x) for x in (saved, indices, ts))
    ys = jtu.tree_map(lambda *y: jnp.concatenate(y), *ys)
    fn_ts = jnp.where(saved, ts, tfinal)
    ys = jax.vmap(lambda t, y: subsaveat.fn(t, y, args))(fn_ts, ys)
    # Those that are not saved would land behind the end.
    size = len(save_state.ts)
    indices = jnp.where(
        saved, indices, size + jnp.arange(len(indices), dtype=jnp.int32)
    )

    # Scatters are slow. Without steps, only that of the final value remains.
    in_order = 0 if subsaveat.steps > 0 else len(indices) - int(subsaveat.t1)

    def write(out, x):
        head, tail = x[:in_order], x[in_order:]
        is_saved = saved[:in_order].reshape(-1, *[1] * (x.ndim - 1))
        head = jnp.where(is_saved, head, out[:in_order])
        out = jnp.concatenate([head, out[in_order:]])
        if len(tail) == 0:
            return out
        return out.at[indices[in_order:]].set(tail, mode="drop", unique_indices=True)

    return dataclasses.replace(
        save_state,
        ts=write(save_state.ts, ts),
        ys=jtu.tree_map(write, save_state.ys, ys),
        save_index=jnp.sum(saved, dtype=jnp.int32),
        saveat_ts_index=num_ts,
    )
