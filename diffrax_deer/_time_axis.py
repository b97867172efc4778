"""What goes along the time axis, from one substep to the others. All of it also works
if this axis is divided over several devices, without any of them having the whole.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, Shaped

from ._custom_types import IntScalarLike, PyTree


def divided(xs: PyTree[Array], sharding: NamedSharding | None) -> PyTree[Array]:
    """The same, with the leading axis divided over devices."""
    if sharding is None:
        return xs
    return jtu.tree_map(lambda x: lax.with_sharding_constraint(x, sharding), xs)


def before(x: Shaped[Array, "substeps ..."], first: Array | float = 0) -> Array:
    """What is at the substep before each of them."""
    # Not by concatenation, for which XLA would gather all of it.
    moved = lax.pad(x, jnp.zeros((), x.dtype), _only_first(x, (1, -1, 0)))
    return jnp.where(_is_at(x, 0), first, moved)


def after(x: Shaped[Array, "substeps ..."], last: Array | float = 0) -> Array:
    """What is at the substep after each of them."""
    moved = lax.pad(x, jnp.zeros((), x.dtype), _only_first(x, (-1, 1, 0)))
    return jnp.where(_is_at(x, len(x) - 1), last, moved)


def at_index(x: Shaped[Array, "substeps ..."], index: IntScalarLike) -> Array:
    """What is at one of them."""
    # A sum, of one term that is not zero, as devices would have to exchange more to
    # look it up.
    return jnp.sum(jnp.where(_is_at(x, index), x, 0), axis=0, dtype=x.dtype)


def last(x: Shaped[Array, "substeps ..."], sharding: NamedSharding | None) -> Array:
    """What is at the last one."""
    return x[-1] if sharding is None else at_index(x, len(x) - 1)


def with_last(
    x: Shaped[Array, "substeps ..."], y: Array, sharding: NamedSharding | None
) -> Shaped[Array, "substeps ..."]:
    """The same, but for the last one.

    If that is all that is asked for, then XLA sees that it depends on nothing else.
    """
    if sharding is not None:
        return jnp.where(_is_at(x, len(x) - 1), y, x)
    return jnp.concatenate([x[:-1], y[None]])


def first_of(is_so: Bool[Array, "substeps ..."]) -> Int[Array, "..."]:
    """The index of the first one, or their number if there is none."""
    index = jnp.arange(len(is_so), dtype=jnp.int32)
    index = jnp.expand_dims(index, range(1, is_so.ndim))
    return jnp.min(jnp.where(is_so, index, len(is_so)), axis=0, initial=len(is_so))


def place_in(
    xs: Shaped[Array, " length"],
    x: Shaped[Array, "*shape"],
    side: Literal["left", "right"] = "left",
) -> Int[Array, "*shape"]:
    """Where to put `x` so that these remain in order."""
    # Each round of a loop would be several kernels on a GPU.
    method = "scan" if jax.default_backend() == "cpu" else "scan_unrolled"
    return jnp.searchsorted(xs, x, side=side, method=method)


def running(
    fn: Callable,
    combine: Callable[[Array, Array], Array],
    x: Shaped[Array, "substeps ..."],
    sharding: NamedSharding | None,
) -> Array:
    """`fn(x, axis=0)`, a cumulative sum, say, of which `combine` adds up parts."""
    if sharding is None:
        return fn(x, axis=0)

    def local(x):
        x = fn(x, axis=0)
        index = lax.axis_index(axis_names(sharding))
        ends = lax.all_gather(x[-1], axis_names(sharding))
        totals = fn(ends, axis=0)[jnp.maximum(index - 1, 0)]
        return jnp.where(index == 0, x, combine(x, totals[None]))

    return on_each(local, sharding)(x)


def on_each(fn: Callable, sharding: NamedSharding) -> Callable:
    """A function of what is on each of the devices."""
    spec = PartitionSpec(sharding.spec[0])
    return jax.shard_map(
        fn,
        mesh=sharding.mesh,
        in_specs=spec,
        out_specs=spec,
        axis_names=set(axis_names(sharding)),
        check_vma=False,
    )


def axis_names(sharding: NamedSharding) -> tuple[str, ...]:
    """The axes of the mesh that the time axis is divided over."""
    names = sharding.spec[0]
    return names if isinstance(names, tuple) else (names,)


def num_parts(sharding: NamedSharding | None) -> int:
    """Into how many parts the time axis is divided."""
    if sharding is None:
        return 1
    number = 1
    for name in axis_names(sharding):
        number *= sharding.mesh.shape[name]
    return number


def _is_at(x, index):
    places = jnp.arange(len(x), dtype=jnp.int32) == index
    return places.reshape(-1, *[1] * (x.ndim - 1))


def _only_first(x, padding):
    return [padding, *[(0, 0, 0)] * (x.ndim - 1)]
