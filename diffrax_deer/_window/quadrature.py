"""Leaves of the state that no vector field reads: running costs, log-densities, or the
gradients of parameters in an adjoint equation. There is nothing to be solved for them.
"""

import functools as ft
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractTerm
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from .._custom_types import PyTree
from .._dependence import inputs_read
from .._time_axis import before, running
from .base import Iterate
from .elimination import weighted
from .stages import all_stages, finite_or_large
from .tableau import Tableau


# Of so many substeps at once that their stages take no more than this.
_MAX_BYTES = 2**26


class Split(eqx.Module):
    """A state, divided into the leaves that are read and those that are not. In either
    part the others are `None`."""

    y0: PyTree[Array]
    reads: tuple[bool, ...] = eqx.field(static=True)

    @property
    def is_trivial(self) -> bool:
        return all(self.reads)

    def read(self, y: PyTree[Array]) -> PyTree[Array]:
        return eqx.filter(y, self._mask)

    def unread(self, y: PyTree[Array]) -> PyTree[Array]:
        return eqx.filter(y, self._mask, inverse=True)

    def filled(self, read: PyTree[Array]) -> PyTree[Array]:
        """With zeros for what is not read."""
        zeros = jtu.tree_map(jnp.zeros_like, self.unread(self.y0))
        return eqx.combine(read, zeros)

    @property
    def _mask(self):
        return jtu.tree_structure(self.y0).unflatten(self.reads)


def which_are_read(
    fn: Callable[[PyTree[Any]], PyTree[Any]], y0: PyTree[Any]
) -> tuple[bool, ...]:
    """Which leaves of `y0` the values of `fn` may depend on. All if there are none."""
    leaves = jtu.tree_leaves(y0)
    # Of a single one there is nothing to choose, so that it need not be looked at.
    if len(leaves) > 1:
        reads = inputs_read(fn, y0)
        if any(reads):
            return reads
    return (True,) * len(leaves)


class ReadTerm(AbstractTerm):
    """A term, for what is read only."""

    term: AbstractTerm
    split: Split

    def vf(self, t, y, args):
        # Whatever a solver passes to `prod` below.
        return self.term.vf(t, self.split.filled(y), args)

    def contr(self, t0, t1, **kwargs):
        return self.term.contr(t0, t1, **kwargs)

    def prod(self, vf, control):
        return self.split.read(self.term.prod(vf, control))

    def vf_prod(self, t, y, args, control):
        y = self.split.filled(y)
        return self.split.read(self.term.vf_prod(t, y, args, control))

    def is_vf_expensive(self, t0, t1, y, args):
        return self.term.is_vf_expensive(t0, t1, self.split.filled(y), args)


class Whole(eqx.Module):
    """The steps of a solver.

    **Attributes:**

    - `y0`, `y1`: the values at the start of the first and at the end of the last one.
    - `at`: the values at the ends of all, and their stages.
    - `errors`: their error estimates. `None` if these do not follow from the stages.
    """

    y0: Float[Array, " size"]
    y1: Float[Array, " size"]
    at: Iterate
    errors: Float[Array, "substeps size"] | None

    @property
    def starts(self) -> Float[Array, "substeps size"]:
        return before(self.at.ys, self.y0)


def integrate(
    fns: tuple[Callable, ...],
    tableau: Tableau,
    xs: PyTree[Array],
    points: Float[Array, "substeps stages _size"],
    y0: Float[Array, " size"],
    sharding: NamedSharding | None,
) -> Whole:
    """The steps of what is not read, which are sums. Of each part there is a function
    `(control, time, vector) -> vector` of what is read, to be evaluated at `points`."""
    substeps, shape = len(points), (*tableau.b.shape, y0.size)
    most = _MAX_BYTES // max(math.prod(shape) * y0.dtype.itemsize, 1)
    if sharding is not None:
        # On each of the devices there is less.
        most = substeps
    divisors = (n for n in range(1, substeps + 1) if substeps % n == 0)
    chunk = max(n for n in divisors if n <= max(most, 1))
    is_unknown = jnp.asarray(tableau.is_unknown)[None, None, :, None]

    def body(y, inputs):
        ks = jax.vmap(ft.partial(all_stages, fns, tableau))(*inputs)
        ks = ks.reshape(chunk, *shape).astype(y.dtype)
        ks = jnp.where(is_unknown, ks, finite_or_large(ks))
        increments = weighted(tableau.b, ks)
        ys = y[None] + running(jnp.cumsum, jnp.add, increments, sharding)
        return ys[-1], (Iterate(ys, ks), weighted(tableau.b_error, ks))

    # All that is not asked for, such as any of it but the last value, is dead code.
    split = lambda x: x.reshape(substeps // chunk, chunk, *x.shape[1:])
    join = lambda x: x.reshape(substeps, *x.shape[2:])
    if chunk < substeps:
        body = jax.checkpoint(body, prevent_cse=False)
    y1, out = lax.scan(body, y0, jtu.tree_map(split, (xs, points)))
    return Whole(y0, y1, *jtu.tree_map(join, out))
