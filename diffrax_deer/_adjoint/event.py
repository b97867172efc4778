from collections.abc import Callable

import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from diffrax import AbstractLocalInterpolation, Event, RESULTS
from jaxtyping import Array, Bool, Int

from .._custom_types import PyTree, RealScalarLike


def _cond_fns(event: Event) -> list[Callable]:
    return jtu.tree_leaves(event.cond_fn, is_leaf=callable)


def _directions(event: Event) -> list[bool | None]:
    return jtu.tree_leaves(event.direction, is_leaf=lambda x: x is None)


def event_values(
    event: Event,
    call: Callable[[Callable, RealScalarLike, PyTree[Array]], Array],
    t: RealScalarLike,
    y: PyTree[Array],
) -> list[Array]:
    """Those of all functions of the event, which `call(cond_fn, t, y)` evaluates."""
    return [jnp.asarray(call(cond_fn, t, y)) for cond_fn in _cond_fns(event)]


def first_crossing(
    event: Event,
    before: list[Array],
    after: list[Array],
) -> tuple[Bool[Array, ""], Int[Array, ""], PyTree[Bool[Array, ""]]]:
    """Looks for the first substep at the end of which an event has occurred.

    Of each function of the event, these are its value at the start of a window, and
    those at the ends of its substeps. They are compared as Diffrax compares those of a
    step.

    **Returns:**

    Whether there is such a substep, its index, and which of the events it was, like
    `diffrax.Solution.event_mask`.
    """
    occurred = []
    for first, values, direction in zip(before, after, _directions(event)):
        if values.dtype == jnp.dtype(bool):
            occurred.append(values)
            continue
        new = jnp.sign(values)
        old = jnp.concatenate([jnp.sign(first)[None], new[:-1]])
        if direction is None:
            occurred.append(old != new)
        elif direction:
            occurred.append((old <= 0) & (new > 0))
        else:
            occurred.append((old > 0) & (new <= 0))
    occurred = jnp.stack(occurred)
    substep = jnp.argmax(jnp.any(occurred, axis=0)).astype(jnp.int32)
    at_substep = occurred[:, substep]
    # Of several at once, only the first one counts.
    mask = at_substep & (jnp.cumsum(at_substep) == 1)
    structure = jtu.tree_structure(event.cond_fn, is_leaf=callable)
    return jnp.any(occurred), substep, jtu.tree_unflatten(structure, list(mask))


def event_time(
    event: Event,
    call: Callable[[Callable, RealScalarLike, PyTree[Array]], Array],
    mask: PyTree[Bool[Array, ""]],
    t0: RealScalarLike,
    t1: RealScalarLike,
    interpolation: AbstractLocalInterpolation,
) -> tuple[Array, RESULTS]:
    """The time within the substep `[t0, t1]` at which the event in `mask` occurs."""
    if event.root_finder is None:
        return jnp.asarray(t1), RESULTS.successful

    def value(t, _):
        y = interpolation.evaluate(t)
        # In a batch, this is also called where no event has occurred.
        out = t1 - t
        for cond_fn, is_this in zip(_cond_fns(event), jtu.tree_leaves(mask)):
            value = jnp.asarray(call(cond_fn, t, y))
            if value.dtype == jnp.dtype(bool):
                # Known to have become true some time during the substep.
                value = t1 - t
            out = jnp.where(is_this, value.astype(out.dtype), out)
        return out

    root = optx.root_find(
        value,
        event.root_finder,
        y0=jnp.asarray(t1),
        options=dict(lower=t0, upper=t1),
        throw=False,
    )
    return root.value, RESULTS.promote(root.result)
