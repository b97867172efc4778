"""Counts how often a vector field is evaluated, whatever any solver says of that."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap


class Count(NamedTuple):
    """`span`: how many evaluations of the vector field, or of its derivative, followed
    one another. `work`: how many there were if one in a batch counts as one."""

    span: int
    work: int


class Counter:
    """Ticks once for every evaluation of `wrap(vector_field)` that is really made, or
    of its derivative, and only once for a batch of them."""

    def __init__(self):
        self.span = self.work = 0

    def read(self) -> Count:
        jax.effects_barrier()
        count = Count(self.span, self.work)
        self.span = self.work = 0
        return count

    def wrap(self, vector_field: Callable) -> Callable:
        @jax.custom_jvp
        def counted(y):
            return tick(y)

        @counted.defjvp
        def _(primals, tangents):
            [y], [t] = primals, tangents
            return counted(y), tick(t)

        @custom_vmap
        def tick(y):
            return self._tick(y, 1)

        # A batch of a batch is a larger batch.
        def batched(size):
            @custom_vmap
            def tick(y):
                return self._tick(y, size)

            @tick.def_vmap
            def _(axis_size, in_batched, y):
                return batched(axis_size * size)(y), in_batched[0]

            return tick

        @tick.def_vmap
        def _(axis_size, in_batched, y):
            return batched(axis_size)(y), in_batched[0]

        return lambda t, y, args: vector_field(t, counted(y), args)

    def _tick(self, y, size):
        def tick(_):
            self.span += 1
            self.work += size
            return np.zeros((), y.dtype)

        # A callback whose output is used, so that it is called exactly if the vector
        # field is evaluated. (What it is called with keeps different ones apart, and is
        # small, as JAX may hang on callbacks with large arguments on a CPU.)
        form = jax.ShapeDtypeStruct((), y.dtype)
        zero = jax.pure_callback(tick, form, jnp.ravel(y)[:1])
        return y + zero


def counting(
    solve: Callable[..., Any], vector_field: Callable
) -> Callable[..., tuple[Any, Count]]:
    """`solve(vector_field, *args)` as a function of `args`, compiled, that also tells
    how often it evaluates the vector field."""
    counter = Counter()
    jitted = jax.jit(lambda *args: solve(counter.wrap(vector_field), *args))

    def call(*args):
        out = jax.block_until_ready(jitted(*args))
        return out, counter.read()

    return call
