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
from .._time_axis import after, before
from .base import AbstractElimination, AbstractWindow, Iterate
from .elimination import BlockElimination, StageElimination, weighted
from .tableau import Tableau


# XLA stores each array with a kernel of its own, which in a loop over steps takes as
# long as a small stage. Up to this size of the state, the end of a step is stored
# behind its stages (then these are, too, if only the end is asked for).
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
    def stages(self) -> tuple[int, int]:
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
    def is_optional(self) -> np.ndarray:
        return self.tableau.is_optional

    @property
    def idle_jacobian(self) -> float:
        return 0.0

    def eliminate(self, J: Matrices) -> AbstractElimination:
        has_blocks = J.ndim == 6
        kind = BlockElimination if has_blocks else StageElimination
        return kind(self.tableau, J)

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

    def sequential(self, is_fsal: bool) -> Iterate:
        """The solution, one stage after the other. Must be explicit. The last stage of
        a substep may be the first one of the next, but for their lengths."""

        # A loop over stages, too, as then the vector field has to be compiled only
        # once. (It is no slower.)
        def body(y, x):
            def stage(i, k):
                increment = jnp.sum(A[:, i] * k, axis=(0, 1))
                return k.at[:, i].set(self.stage(x, i, y + increment))

            k = lax.fori_loop(0, needed, stage, zeros)
            y = y + jnp.sum(b * k, axis=(0, 1))
            return y, (y[:0], k.at[:, needed].set(y)) if is_small else (y, k)

        stages, is_small = self.tableau.stages, self.y0.size <= _SMALL
        needed = int(np.max(np.flatnonzero(~self.is_optional[0]))) + 1
        A, b, zeros = self._constants(max(stages, needed + 1) if is_small else stages)
        _, (ys, ks) = lax.scan(body, self.y0, self.xs)
        if is_small:
            ys, ks = ks[:, 0, needed], ks[:, :, :stages]
        # Those that nothing depends on can wait, and perhaps are not asked for.
        increments = weighted(self.tableau.A[:, needed:, :needed], ks[:, :, :needed])
        others = self.starts(ys)[:, None] + increments
        for i in range(needed, stages):
            if is_fsal and i == stages - 1:
                values = self._first_of_next(ys, ks[:, :, 0])
            else:
                stage = jax.vmap(lambda x, y: self.stage(x, i, y))
                values = stage(self.xs, others[:, i - needed])
            ks = ks.at[:, :, i].set(values)
        return Iterate(ys, ks)

    def _first_of_next(self, ys, firsts):
        t0s, t1s, _ = self.xs
        dt = (t1s - t0s).astype(ys.dtype)[:, None, None]
        # A window may be padded with substeps of length zero, and begin with these if
        # it is not longer than a few rounding errors.
        last = jnp.max(jnp.where(t0s == t1s, 0, jnp.arange(len(ys), dtype=jnp.int32)))
        x, y = jtu.tree_map(lambda x: x[last], (self.xs, ys))
        ratio = jnp.where(
            after(dt) == 0, 0, dt / jnp.where(after(dt) == 0, 1, after(dt))
        )
        values = ratio * after(firsts)
        return values.at[last].set(self.stage(x, self.tableau.stages - 1, y))

    def derivative(self, at, tangent, start, b):
        core, t_core = self.core, tangent.core

        def body(dy, inputs):
            x, t_x, points, b = inputs

            def stage(i, dk):
                moved = dy + jnp.sum(A[:, i] * dk, axis=(0, 1))
                value = lambda core, x, y: core.stage(x, i, y)
                at = core, x, points[i]
                _, dk_i = eqx.filter_jvp(value, at, (t_core, t_x, moved))
                dk_i = dk_i if b is None else dk_i + b.ks[:, i]
                return dk.at[:, i].set(dk_i)

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
