"""Brownian motion at many times at once.

This module alone knows how Diffrax finds it at a single one: from the root of a tree
down to a leaf, by numbers drawn at every node. All of these numbers are Diffrax's own,
to the last bit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.core
import jax.extend.core
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import VirtualBrownianTree
from diffrax._brownian.tree import _levy_diff
from diffrax._custom_types import levy_tree_transpose
from diffrax._misc import linear_rescale
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int, PRNGKeyArray, Real

from .._custom_types import PyTree, RealScalarLike


# If there are many points, then on how many times less of them to go down to where
# these no longer share a node.
_MANY = 64
_FEWER = 8


class BrownianTree(VirtualBrownianTree):
    """Stands in for a tree and has its values, but goes down to all of a batch of times
    together, level by level. If these are in order then hardly any node is visited
    twice."""

    def __init__(self, tree: VirtualBrownianTree):
        for field in dataclasses.fields(VirtualBrownianTree):
            setattr(self, field.name, getattr(tree, field.name))

    def evaluate(
        self,
        t0: RealScalarLike,
        t1: RealScalarLike | None = None,
        left: bool = True,
        use_levy: bool = False,
    ):
        if t1 is None:
            return super().evaluate(t0, t1, left, use_levy)
        # What can be batched must be an argument.
        arrays, static = eqx.partition(self, eqx.is_array)

        def single(arrays, t0, t1):
            tree = super(BrownianTree, eqx.combine(arrays, static))
            return tree.evaluate(t0, t1, left, use_levy)

        def batch(axis_size, is_batched, arrays, t0, t1):
            in_axes = jtu.tree_map(lambda x: 0 if x else None, tuple(is_batched))
            if any(jtu.tree_leaves(is_batched[0])):
                # Of many trees, each at a time of its own.
                out = jax.vmap(single, in_axes, axis_size=axis_size)(arrays, t0, t1)
            else:
                t0s, t1s = (jnp.broadcast_to(t, axis_size) for t in (t0, t1))
                out = _increments(eqx.combine(arrays, static), t0s, t1s, use_levy)
            return out, jtu.tree_map(lambda _: True, out)

        evaluate = custom_vmap(single)
        evaluate.def_vmap(batch)
        return evaluate(arrays, jnp.asarray(t0), jnp.asarray(t1))


def _increments(
    tree: VirtualBrownianTree,
    t0s: Real[Array, " steps"],
    t1s: Real[Array, " steps"],
    use_levy: bool,
) -> PyTree[Array]:
    """Those over many steps."""
    t0s = eqxi.nondifferentiable(t0s, name="t0")
    t1s = eqxi.nondifferentiable(t1s, name="t1")
    # If one begins where the other ends, then this is all of them. (Else they have been
    # picked from many, or there are jumps between them. In a batch, all or none.)
    is_grid = eqxi.unvmap_all(jnp.all(t0s[1:] == t1s[:-1]))
    ts = jnp.stack([jnp.append(t0s, t1s[-1]), jnp.append(t0s[0], t1s)])
    rs = linear_rescale(tree.t0, ts, tree.t1)
    rs = eqxi.error_if(
        rs,
        (rs < 0) | (rs > 1),
        "Cannot evaluate VirtualBrownianTree outside of its range [t0, t1].",
    )

    def values(rs):
        value = lambda key, struct: _values(tree, key, struct, rs)
        return jtu.tree_map(value, tree.key, tree.shape)

    like = jax.eval_shape(values, rs[0])
    zeros = lambda _: jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    # A loop, so that it has to be compiled only once.
    needed = jnp.stack([jnp.array(True), jnp.invert(is_grid)])
    both = lax.map(lambda x: lax.cond(x[0], values, zeros, x[1]), (needed, rs))
    starts = jtu.tree_map(lambda x: x[0, :-1], both)
    ends = jtu.tree_map(lambda x: jnp.where(is_grid, x[0, 1:], x[1, 1:]), both)

    def increment(start, end):
        out = jtu.tree_map(_levy_diff, tree.shape, start, end)
        out = tree._denormalise_bm_inc(levy_tree_transpose(tree.shape, out))
        return out if use_levy else out.W

    return jax.vmap(increment)(starts, ends)


def _values(
    tree: VirtualBrownianTree,
    key: PRNGKeyArray,
    struct: jax.ShapeDtypeStruct,
    rs: Float[Array, " points"],
) -> PyTree[Array]:
    """A leaf of the path, at many times in [0, 1]."""
    single = lambda r: tree._evaluate_leaf(key, r, struct)
    begin, is_above, descend, end = _taken_apart(single, rs[0])
    befores, nodes = jax.vmap(begin)(rs)
    number, level = len(rs), jnp.array(0, jnp.int32)

    def down(nodes, befores, level, last):
        first = jtu.tree_map(lambda x: x[0], befores)

        def goes_on(carry):
            nodes, level = carry
            # All of them are on the same level.
            node = jtu.tree_map(lambda x: x[0], nodes)
            return is_above(first, node) & (level <= last)

        def step(carry):
            nodes, level = carry
            return jax.vmap(descend)(befores, nodes), level + 1

        return lax.while_loop(goes_on, step, (nodes, level))

    if number > _MANY:
        # A point for each of the nodes on the last level that has so few of them. With
        # others, they are as many as there may be.
        few = -(-number // _FEWER)
        levels = _separation(rs, struct)
        order = jnp.argsort(levels)
        chosen = jnp.sort(order[:few])
        of_chosen = lambda x: jtu.tree_map(lambda x: x[chosen], x)
        nodes, level = down(
            *(of_chosen(nodes), of_chosen(befores), level), levels[order[few]] - 2
        )
        index = jnp.searchsorted(
            *(chosen, jnp.arange(number)), side="right", method="scan_unrolled"
        )
        nodes = jtu.tree_map(lambda x: x[index - 1], nodes)
    nodes, _ = down(nodes, befores, level, jnp.array(jnp.iinfo(jnp.int32).max))
    return jax.vmap(end)(befores, nodes)


def _separation(
    rs: Float[Array, " points"], struct: jax.ShapeDtypeStruct
) -> Int[Array, " points"]:
    """From which level on points are in another node than their predecessors. Zero for
    the first one, and if there is no such level then more than there are levels."""
    dtype = jnp.finfo(struct.dtype).dtype
    bits = jnp.finfo(dtype).nmant
    # That on the last level that can be told apart, whose bits are the way to it. As in
    # Diffrax, times are in the node that ends with them.
    integer = jnp.int32 if bits < 31 else jnp.int64
    node = jnp.ceil(rs.astype(dtype).astype(rs.dtype) * 2.0**bits) - 1
    node = jnp.maximum(node, 0).astype(integer)
    common = lax.clz(node[1:] ^ node[:-1]) - (jnp.iinfo(integer).bits - bits)
    return jnp.append(jnp.array(0, integer), common + 1).astype(jnp.int32)


def _taken_apart(
    fn: Callable[[Any], PyTree[Array]], example: PyTree[Array]
) -> tuple[Callable, Callable, Callable, Callable]:
    """A function that consists of a loop and what is before and after it, as functions
    `begin(x) -> (before, carry)`, `goes_on(before, carry) -> bool`,
    `step(before, carry) -> carry` and `end(before, carry) -> fn(x)`."""
    closed, form = jax.make_jaxpr(fn, return_shape=True)(example)
    jaxpr, consts = closed.jaxpr, closed.consts
    [i] = [i for i, eqn in enumerate(jaxpr.eqns) if eqn.primitive.name == "while"]
    loop, earlier = jaxpr.eqns[i], jaxpr.eqns[:i]
    known = [*jaxpr.invars, *(var for eqn in earlier for var in eqn.outvars)]
    head = jaxpr.replace(eqns=earlier, outvars=[*known, *loop.invars])
    tail = jaxpr.replace(invars=[*known, *loop.outvars], eqns=jaxpr.eqns[i + 1 :])
    condition, body = (
        jax.extend.core.jaxpr_as_fun(loop.params[name])
        for name in ("cond_jaxpr", "body_jaxpr")
    )
    of_cond, of_body = loop.params["cond_nconsts"], loop.params["body_nconsts"]

    def begin(x):
        out = jax.core.eval_jaxpr(head, consts, x)
        known_values, out = out[: len(known)], out[len(known) :]
        of_loop = out[:of_cond], out[of_cond : of_cond + of_body]
        return (known_values, *of_loop), out[of_cond + of_body :]

    def goes_on(before, carry):
        [out] = condition(*before[1], *carry)
        return out

    def step(before, carry):
        return body(*before[2], *carry)

    def end(before, carry):
        out = jax.core.eval_jaxpr(tail, consts, *before[0], *carry)
        return jtu.tree_unflatten(jtu.tree_structure(form), out)

    return begin, goes_on, step, end
