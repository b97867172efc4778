import itertools
from collections.abc import Callable

import jax
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
    t1 = jnp.asarray(t1)
    if event.root_finder is None:
        return t1, RESULTS.successful

    def values(t):
        y = interpolation.evaluate(t)
        return [jnp.asarray(call(fn, t, y)) for fn in _cond_fns(event)]

    # Boolean ones are known to have become true some time during the substep.
    is_float = [x.dtype != jnp.dtype(bool) for x in jax.eval_shape(values, t1)]
    has_root = [*itertools.compress(jtu.tree_leaves(mask), is_float)]
    if len(has_root) == 0:
        return t1, RESULTS.successful

    def value(t, _):
        # Also where no event has occurred there has to be a root, in the middle.
        out = (t0 + t1) / 2 - t
        for x, is_this in zip(itertools.compress(values(t), is_float), has_root):
            out = jnp.where(is_this, x.astype(out.dtype), out)
        return out

    root = optx.root_find(
        value,
        event.root_finder,
        y0=t1,
        options=dict(lower=t0, upper=t1),
        throw=False,
    )
    is_found = jnp.any(jnp.stack(has_root))
    result = RESULTS.where(is_found, RESULTS.promote(root.result), RESULTS.successful)
    return jnp.where(is_found, root.value, t1), result
