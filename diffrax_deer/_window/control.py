"""The controls of many steps at once: increments of time, of Brownian motion, ..."""

from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from diffrax import AbstractTerm, MultiTerm, VirtualBrownianTree
from diffrax._term import WrapTerm
from jaxtyping import Array, Real

from .._custom_types import PyTree, Terms
from .brownian import BrownianTree


Kwargs = tuple[tuple[str, Any], ...]


class KnownControl(WrapTerm):
    """A term whose control over one step is known, and looked up if asked for.

    This is a `diffrax.WrapTerm` for the solvers that look into these.
    """

    t0: Real[Array, ""]
    t1: Real[Array, ""]
    control: PyTree[Array]
    kwargs: Kwargs = eqx.field(static=True)

    def contr(self, t0, t1, **kwargs):
        # Anything else than the very same variables might be another time.
        if t0 is self.t0 and t1 is self.t1 and _frozen(kwargs) == self.kwargs:
            return self.control
        return super().contr(t0, t1, **kwargs)


def has_tree(terms: Terms) -> bool:
    """Whether controls are evaluated much more quickly if many are at once."""
    return any(map(_is_tree, jtu.tree_leaves(terms, is_leaf=_is_tree)))


def controls(
    terms: Terms,
    kwargs: PyTree[dict],
    t0s: Real[Array, " steps"],
    t1s: Real[Array, " steps"],
) -> list[PyTree[Array]]:
    """The control of each single term, over many steps. `kwargs` is what the solver
    asks for."""
    terms = batched(terms)
    leaves, _ = _flatten(terms)
    pairs = list(zip(leaves, _of_each(terms, kwargs)))

    def control(t0, t1):
        return [term.contr(t0, t1, **dict(kwargs)) for term, kwargs in pairs]

    return jax.vmap(control)(t0s, t1s)


def batched(terms: Terms) -> Terms:
    """The same, but for a batch of times at once."""
    fix = lambda x: BrownianTree(x) if _is_tree(x) else x
    return jtu.tree_map(fix, terms, is_leaf=_is_tree)


def with_controls(
    terms: Terms,
    kwargs: PyTree[dict],
    t0: Real[Array, ""],
    t1: Real[Array, ""],
    controls: list[PyTree[Array]],
) -> Terms:
    """The same over one step, for a solver."""
    leaves, treedef = _flatten(terms)
    known = []
    for term, control, kwargs in zip(leaves, controls, _of_each(terms, kwargs)):
        if isinstance(term, WrapTerm):
            term, direction = term.term, term.direction
        else:
            direction = 1
        known.append(KnownControl(term, direction, t0, t1, control, kwargs))
    return jtu.tree_unflatten(treedef, known)


def _is_tree(x):
    return type(x) is VirtualBrownianTree


def _flatten(terms):
    is_single = lambda x: isinstance(x, AbstractTerm) and not isinstance(x, MultiTerm)
    return jtu.tree_flatten(terms, is_leaf=is_single)


def _of_each(terms, kwargs) -> list[Kwargs]:
    """Of each single term. Diffrax has one entry for each of them, or for a `MultiTerm`
    as a whole."""
    if isinstance(terms, MultiTerm) and isinstance(kwargs, tuple):
        children, of_children = terms.terms, kwargs
    elif isinstance(terms, AbstractTerm):
        leaves, _ = _flatten(terms)
        return [_frozen(kwargs)] * len(leaves)
    else:
        is_child = lambda x: x is not terms
        children, treedef = jtu.tree_flatten(terms, is_leaf=is_child)
        of_children = treedef.flatten_up_to(kwargs)
    return [x for pair in zip(children, of_children) for x in _of_each(*pair)]


def _frozen(kwargs: dict) -> Kwargs:
    return tuple(sorted(kwargs.items()))
