"""The memory that `DeerAdjoint` says it needs, against XLA's own figure."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import pytest
from diffrax import ODETerm
from diffrax_deer import DeerAdjoint, DeerSolver


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
@pytest.mark.parametrize("size", (2, 16))
def test_memory_per_window(size, dtype):
    points = 32

    def memory(max_windows):
        def loss(y0):
            sol = diffrax.diffeqsolve(
                ODETerm(lambda t, y, args: -jnp.sin(y)),
                DeerSolver(diffrax.Tsit5(), points),
                jnp.zeros((), dtype),
                jnp.ones((), dtype),
                None,
                y0,
                saveat=diffrax.SaveAt(ts=jnp.linspace(0, 1, 5, dtype=dtype)),
                stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-4),
                adjoint=DeerAdjoint(max_windows=max_windows),
            )
            return jnp.sum(sol.ys)  # pyright: ignore

        y0 = jax.ShapeDtypeStruct((size,), dtype)
        compiled: Any = jax.jit(jax.grad(loss)).lower(y0).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    per_window = (memory(1000) - memory(500)) / 500
    per_point = size * (diffrax.Tsit5.tableau.num_stages + 1) + 1
    documented = 5 * points * per_point * jnp.dtype(dtype).itemsize
    assert documented / 3 < per_window < documented
