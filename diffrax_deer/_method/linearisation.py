"""The ways to linearise the substeps of a window."""

from collections.abc import Callable
from typing import cast

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
from equinox import AbstractVar
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_divides
from .._linear_algebra import join, Matrices, split
from .._window import AbstractWindow
from .base import AbstractMethod


class AbstractFullMethod(AbstractMethod):
    """With full Jacobians."""

    def linearise(
        self, window: AbstractWindow, points: Float[Array, "substeps points size"]
    ) -> tuple[Array, Callable[[], Array]]:
        values, jvp = _linearize(window.values, points)

        def jacobians():
            # All points are moved along the same unit vectors.
            def column(unit):
                return jvp(jnp.broadcast_to(unit, points.shape))

            units = jnp.eye(points.shape[-1], dtype=points.dtype)
            return jax.vmap(column, in_axes=0, out_axes=-1)(units[:, None, None])

        return values, jacobians

    def span(self, size: int) -> int:
        return 1


class AbstractDiagonalMethod(AbstractMethod):
    """With the diagonals of the Jacobians, or blocks of them, without ever forming
    these."""

    samples: AbstractVar[int | None]
    key: AbstractVar[PRNGKeyArray | None]
    block: AbstractVar[int]

    def linearise(
        self, window: AbstractWindow, points: Float[Array, "substeps points size"]
    ) -> tuple[Array, Callable[[], Matrices]]:
        check_divides(self.block, points.shape[-1], f"{type(self).__name__}(block=...)")
        values, jvp = _linearize(window.values, points)
        blocks = points.shape[-1] // self.block
        shape = (*points.shape[:-1], blocks)
        zeros = jnp.zeros_like(
            values, shape=(*values.shape[:-1], self.block, self.block, blocks)
        )

        def columns(probe):
            # Of all blocks the first columns, the second ones, ...
            def column(unit):
                moved = jvp(join(unit[None, None, :, None] * probe[:, :, None]))
                return split(moved, blocks)

            units = jnp.eye(self.block, dtype=points.dtype)
            return jax.vmap(column, out_axes=-2)(units)

        # One probe follows the other, which takes no more memory than the blocks.

        def exact():
            def add(i, total):
                unit = jnp.arange(blocks) == i
                probe = jnp.broadcast_to(unit[None, None], shape).astype(points.dtype)
                unit = jnp.expand_dims(unit, range(total.ndim - 1))
                return jnp.where(unit, columns(probe), total)

            return lax.fori_loop(0, blocks, add, zeros)

        def estimated():
            def add(total, key):
                sign = jr.rademacher(key, shape, points.dtype)
                return total + sign[:, None, :, None, None] * columns(sign), None

            key = jr.key(0) if self.key is None else self.key
            samples = cast(int, self.samples)
            keys = jr.split(key, samples)
            total, _ = lax.scan(add, zeros, keys)
            return total / samples

        def jacobians():
            J = exact() if self.samples is None else estimated()
            return J[..., 0, 0, :] if self.block == 1 else J

        return values, jacobians

    def span(self, size: int) -> int:
        return size // self.block if self.samples is None else self.samples


class AbstractIdleMethod(AbstractMethod):
    """As if nothing happened in the substeps."""

    def linearise(
        self, window: AbstractWindow, points: Float[Array, "substeps points size"]
    ) -> tuple[Array, Callable[[], Array]]:
        values = window.values(points)
        return values, lambda: jnp.full_like(values, window.idle_jacobian)

    def span(self, size: int) -> int:
        return 0


def _linearize(fn, x):
    try:
        value, jvp = jax.linearize(fn, x)
        # Some of it JAX would only say much later, without a batch.
        jax.eval_shape(jax.vmap(jvp), x[None])
    except (TypeError, ValueError) as e:
        # There is no class for these errors.
        if "forward-mode" in str(e) or "support JVP" in str(e):
            raise TypeError(_NO_JVP) from e
        raise
    return value, jvp


_NO_JVP = """The vector field (or `deer_scan(f, ...)`) cannot be differentiated in
forward mode, which the iteration needs: it takes the Jacobians of all steps at once.
Either make it differentiable,
- if it is a `jax.custom_vjp`: write it as a `jax.custom_jvp`, which has derivatives in
  both modes;
- if it calls `jax.pure_callback`: wrap this into a `jax.custom_jvp`;
- if it calls another `diffeqsolve`: pass `adjoint=diffrax.DirectAdjoint()` to that one;
or use a method that needs no Jacobian, `method=Jacobi()` or `method=Picard()`, or on a
CPU make the steps one after the other, as an explicit solver does by default."""
