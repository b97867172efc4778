from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.tree_util as jtu
from jax.custom_batching import custom_vmap
from jaxtyping import Array, PyTree


_T = TypeVar("_T")


def one_by_one_on_cpus(fn: Callable[[PyTree[Array]], _T], args: PyTree[Array]) -> _T:
    """`fn(args)`, of which a CPU makes a batch one element after the other.

    For loops of which some elements need more iterations than others. In a batch, all
    of them wait for the slowest, which only pays where they really are made at once.
    """
    leaves, treedef = jtu.tree_flatten(args)
    out_static = None

    def call(*leaves):
        nonlocal out_static
        out = fn(jtu.tree_unflatten(treedef, leaves))
        out, out_static = eqx.partition(out, eqx.is_array)
        return out

    batched_call = custom_vmap(call)

    @batched_call.def_vmap
    def _(axis_size, in_batched, *leaves):
        del axis_size
        batch = [leaf for leaf, is_batched in zip(leaves, in_batched) if is_batched]

        def over_batch(call):
            def one(batch):
                batch = iter(batch)
                element = zip(leaves, in_batched)
                return call(*(next(batch) if b else leaf for leaf, b in element))

            return one

        out = lax.platform_dependent(
            batch,
            # Each element may be a batch, too.
            cpu=lambda batch: lax.map(over_batch(batched_call), batch),
            default=jax.vmap(over_batch(call)),
        )
        return out, jtu.tree_map(lambda _: True, out)

    return eqx.combine(batched_call(*leaves), out_static)
