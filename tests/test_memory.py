"""The memory that `DeerAdjoint` says it needs, against XLA's own figure."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import pytest
from diffrax import ODETerm
from diffrax_deer import DeerAdjoint, DeerSolver


# Each two of these together.
@pytest.mark.parametrize(
    "size,dtype,steps",
    (
        (2, jnp.float32, False),
        (2, jnp.float64, True),
        (16, jnp.float32, True),
        (16, jnp.float64, False),
    ),
)
def test_memory_per_window(size, dtype, steps):
    points = 32

    def memory(max_windows):
        def loss(y0):
            ts = jnp.linspace(0, 1, 5, dtype=dtype)
            sol: Any = diffrax.diffeqsolve(
                ODETerm(lambda t, y, args: -jnp.sin(y)),
                DeerSolver(diffrax.Tsit5(), points),
                jnp.zeros((), dtype),
                jnp.ones((), dtype),
                None,
                y0,
                # All points are kept, or only those around the times asked for.
                saveat=diffrax.SaveAt(ts=ts, dense=steps),
                stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-4),
                adjoint=DeerAdjoint(max_windows=max_windows),
                max_steps=max_windows,
            )
            dense = sol.interpolation.evaluate(0.5) if steps else 0
            return jnp.sum(sol.ys) + jnp.sum(dense)

        y0 = jax.ShapeDtypeStruct((size,), dtype)
        compiled: Any = jax.jit(jax.grad(loss)).lower(y0).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    per_window = (memory(1000) - memory(500)) / 500
    if steps:
        documented = 3 * points * (size * (diffrax.Tsit5.tableau.num_stages + 2) + 1)
    else:
        documented = 2 * (size + 2)
    documented *= jnp.dtype(dtype).itemsize
    assert documented / 3 < per_window < documented
