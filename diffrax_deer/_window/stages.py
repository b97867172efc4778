import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from .._custom_types import PyTree
from .._linear_algebra import Matrices
from .._tangents import with_zeros
from .._time_axis import after, before, with_last
from .base import AbstractElimination, AbstractWindow, Iterate
from .elimination import BlockElimination, StageElimination, weighted
from .tableau import Tableau


# XLA stores each array with a kernel of its own, which in a loop over steps takes as
# long as a small stage. Up to this size of the state, the end of a step is stored
# behind its stages (then these are, too, if only the ends are asked for).
_SMALL = 16


def stage(
    fns: tuple[Callable, ...],
    tableau: Tableau,
    x: PyTree[Array],
    index: Any,
    y: Float[Array, " size"],
) -> Float[Array, "parts _size"]:
    """The functions of all parts `(control, time, vector) -> vector`, for a single
    stage of a substep."""
    t0, t1, controls = x
    increments = []
    for fn, control, c in zip(fns, controls, tableau.c):
        c = jnp.asarray(c, t0.dtype)[index]
        t = jnp.where(c == 1, t1, t0 + c * (t1 - t0))
        increments.append(fn(control, t, y))
    return jnp.stack(increments)


def all_stages(
    fns: tuple[Callable, ...],
    tableau: Tableau,
    x: PyTree[Array],
    points: Float[Array, "stages size"],
) -> Float[Array, "parts stages _size"]:
    index = jnp.arange(tableau.stages, dtype=jnp.int32)
    return jax.vmap(ft.partial(stage, fns, tableau, x), out_axes=1)(index, points)


def finite_or_large(ks: Array) -> Array:
    """For stages that no step depends on: not to be finite is no failure, but an error
    estimate made of it is large."""
    return jnp.where(jnp.isfinite(ks), ks, jnp.finfo(ks.dtype).max / 8)


class StageWindow(AbstractWindow):
    r"""Steps of a Runge--Kutta method, whose stages are unknown as well.

    With $Y_{n, i} = y_n + \sum_j a_{ij} k_{n, j}$ the equations are
    $k_{n, i} = f(t_n + c_i h_n, Y_{n, i}) h_n$ and
    $y_{n + 1} = y_n + \sum_i b_i k_{n, i}$. So the vector field is evaluated for all
    stages of all substeps at once, where the method by itself evaluates one after the
    other.
    """

    # Of each part `(control, time, vector) -> vector`, its increment.
    fns: tuple[Callable, ...]
    # Of each substep when it begins, when it ends, and its control for each part.
    xs: tuple[Array, Array, PyTree[Array]]
    y0: Float[Array, " size"]
    eps: float
    sharding: NamedSharding | None = eqx.field(static=True)
    tableau: Tableau = eqx.field(static=True)

    @property
    def stage_shape(self) -> tuple[int, int]:
        return self.tableau.parts, self.tableau.stages

    @property
    def is_explicit(self) -> bool:
        return self.tableau.is_explicit

    @property
    def is_bounded(self) -> bool:
        return True

    def stage(
        self, x: PyTree[Array], index: Any, y: Float[Array, " size"]
    ) -> Float[Array, "parts size"]:
        """The increments of a single stage of a single substep."""
        return stage(self.fns, self.tableau, x, index, y)

    def value(
        self, x: PyTree[Array], points: Float[Array, "stages size"]
    ) -> Float[Array, "parts stages size"]:
        return all_stages(self.fns, self.tableau, x, points)

    def points(self, at: Iterate) -> Float[Array, "substeps stages size"]:
        return self.starts(at.ys)[:, None] + weighted(self.tableau.A, at.ks)

    def targets(
        self, at: Iterate, values: Float[Array, "substeps parts stages size"]
    ) -> Iterate:
        ends = self.starts(at.ys) + weighted(self.tableau.b, at.ks)
        return Iterate(ends, values)

    def idle(self, at: Iterate) -> Float[Array, "substeps 1 1 size"]:
        return jnp.zeros_like(at.ys)[:, None, None]

    @property
    def idle_jacobian(self) -> float:
        return 0.0

    def eliminate(self, J: Matrices) -> AbstractElimination:
        has_blocks = J.ndim == 6
        kind = BlockElimination if has_blocks else StageElimination
        return kind(self.tableau, J)

    def middle(
        self, at: Iterate
    ) -> tuple["StageWindow", Float[Array, "substeps 1 size"]]:
        """The stage in the middle of each substep, and a window with no other."""
        index, tableau = self.tableau.middle
        alone = dataclasses.replace(self, tableau=tableau)
        return alone, self.points(at)[:, index : index + 1]

    def net(self, r: Iterate) -> Float[Array, "substeps size"]:
        return r.ys + weighted(self.tableau.b, r.ks)

    def as_residual(
        self, errors: Float[Array, "substeps parts stages size"]
    ) -> Iterate:
        return Iterate(jnp.max(errors, axis=(1, 2)), errors)

    def interpolated(self, ys: Float[Array, "substeps size"]) -> Iterate:
        # By a cubic polynomial in each substep, whose slopes are those of parabolas
        # through three neighbours.
        t0s, t1s, _ = self.xs
        dt = (t1s - t0s).astype(ys.dtype)[:, None]
        increments = ys - self.starts(ys)
        # A window may be padded with substeps of length zero.
        average = jnp.where(dt == 0, 0, increments / jnp.where(dt == 0, 1, dt))
        both = jnp.where(dt == 0, 1, before(dt) + dt)
        inner = (dt * before(average) + before(dt) * average) / both
        index = jnp.arange(len(ys), dtype=jnp.int32)[:, None]
        is_first, is_last = index == 0, index == len(ys) - 1
        from_inside = jnp.where(is_last, average, after(inner))
        starts = jnp.where(is_first, 2 * average - from_inside, inner)
        ends = jnp.where(is_last, 2 * average - starts, from_inside)
        c = jnp.asarray(self.tableau.c, ys.dtype)[None, :, :, None]
        row = lambda x: x[:, None, None]
        k0, k1 = row(dt * starts), row(dt * ends)
        ks = 6 * c * (1 - c) * row(increments)
        ks = ks + (1 - c) * (1 - 3 * c) * k0 + c * (3 * c - 2) * k1
        return Iterate(ys, ks / self.tableau.parts)

    def sequential(self) -> Iterate:
        # A loop over stages, too, as then the vector field has to be compiled only
        # once. (It is no slower.)
        def body(y, x):
            def stage(i, k):
                increment = jnp.sum(A[:, i] * k, axis=(0, 1))
                new = self.stage(x, i, y + increment)
                return lax.dynamic_update_index_in_dim(k, new, i, axis=1)

            k = lax.fori_loop(0, stages, stage, zeros)
            y = y + jnp.sum(b * k, axis=(0, 1))
            return y, (y[:0], k.at[:, stages].set(y)) if is_small else (y, k)

        stages, is_small = self.tableau.stages, self.y0.size <= _SMALL
        A, b, zeros = self._constants(stages + 1 if is_small else stages)
        y1, (ys, ks) = lax.scan(body, self.y0, self.xs)
        if is_small:
            ys, ks = ks[:, 0, stages], ks[:, :, :stages]
        return Iterate(with_last(ys, y1, self.sharding), ks)

    def completed(self, at: Iterate, tableau: Tableau, is_fsal: bool) -> Iterate:
        """With all stages of `tableau`, of which those solved for are a part. The last
        stage of a substep may be the first one of the next, but for their lengths."""
        is_known = tableau.is_unknown
        index, others = np.flatnonzero(is_known), np.flatnonzero(~is_known)
        if len(others) == 0:
            return at
        if is_fsal and self.sharding is None:
            values = self._first_of_next(at, tableau)[:, :, None]
        else:
            A = tableau.A[:, others][:, :, index]
            points = self.starts(at.ys)[:, None] + weighted(A, at.ks)
            one = ft.partial(stage, self.fns, tableau)
            each = jax.vmap(one, in_axes=(None, 0, 0), out_axes=1)
            values = jax.vmap(each, in_axes=(0, None, 0))(self.xs, others, points)
        # Slices, which XLA puts together again. It would look up what has an index.
        known = iter(jnp.split(at.ks, len(index), axis=2))
        rest = iter(jnp.split(finite_or_large(values), len(others), axis=2))
        ks = [next(known if is_one else rest) for is_one in is_known]
        return Iterate(at.ys, jnp.concatenate(ks, axis=2))

    def _first_of_next(self, at, tableau):
        t0s, t1s, _ = self.xs
        dt = (t1s - t0s).astype(at.ys.dtype)[:, None, None]
        # A window may be padded with substeps of length zero, and consist of these if
        # it is no longer than a few rounding errors.
        numbers = jnp.arange(len(at.ys), dtype=jnp.int32)
        last = jnp.max(jnp.where(t0s == t1s, 0, numbers))
        x, y = jtu.tree_map(lambda x: x[last], (self.xs, at.ys))
        next_dt = after(dt)
        ratio = jnp.where(next_dt == 0, 0, dt / jnp.where(next_dt == 0, 1, next_dt))
        of_last = stage(self.fns, tableau, x, tableau.stages - 1, y)
        return (ratio * after(at.ks[:, :, 0])).at[last].set(of_last)

    def derivative(self, at, tangent, start, b):
        core, t_core = self.core, tangent.core

        def body(dy, inputs):
            x, t_x, points, b = inputs

            def stage(i, dk):
                moved = dy + jnp.sum(A[:, i] * dk, axis=(0, 1))
                value = lambda core, x, y: core.stage(x, i, y)
                at = core, x, points[i]
                k_i, dk_i = eqx.filter_jvp(value, at, (t_core, t_x, moved))
                dk_i = with_zeros(dk_i, k_i)
                dk_i = dk_i if b is None else dk_i + b.ks[:, i]
                return lax.dynamic_update_index_in_dim(dk, dk_i, i, axis=1)

            dk = lax.fori_loop(0, self.tableau.stages, stage, zeros)
            dy = dy + jnp.sum(weights * dk, axis=(0, 1))
            dy = dy if b is None else dy + b.ys
            return dy, (dy, dk)

        A, weights, zeros = self._constants(self.tableau.stages)
        # Otherwise backwards all evaluations would be stored before any is needed.
        body = jax.checkpoint(body, prevent_cse=False)
        inputs = (self.xs, tangent.xs, self.points(at), b)
        _, (dys, dks) = lax.scan(body, start, inputs)
        return Iterate(dys, dks)

    def _constants(self, places):
        # With places for so many stages, and an axis for the components.
        A, b = self.tableau.A, self.tableau.b
        behind = (0, places - self.tableau.stages)
        A = np.pad(A, [(0, 0), behind, behind])[..., None]
        b = np.pad(b, [(0, 0), behind])[..., None]
        dtype, shape = self.y0.dtype, (len(b), places, self.y0.size)
        return jnp.asarray(A, dtype), jnp.asarray(b, dtype), jnp.zeros(shape, dtype)
