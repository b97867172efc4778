"""How much memory is needed, by XLA's own figure."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import pytest
from diffrax import ODETerm
from diffrax_deer import DeerAdjoint, DeerSolver


# What `DeerAdjoint` says it needs. Each two of these together.
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


@pytest.mark.parametrize("size", (2, 32))
def test_only_the_end_of_a_window(size):
    # Of all substeps there are the times, but none of the values.
    substeps = 1024

    def end(y0):
        term = ODETerm(lambda t, y, args: -jnp.sin(y))
        solver = DeerSolver(diffrax.Tsit5(), substeps)
        return diffrax.diffeqsolve(term, solver, 0.0, 1.0, 1.0, y0).ys

    y0 = jax.ShapeDtypeStruct((size,), jnp.float64)
    compiled: Any = jax.jit(end).lower(y0).compile()
    number = compiled.memory_analysis().temp_size_in_bytes / 8 - 4 * substeps
    assert number < substeps * size / 4


@pytest.mark.parametrize(
    "solver",
    (diffrax.Tsit5(), diffrax.Kvaerno3(), DeerSolver(diffrax.Kvaerno3(), 8)),
)
def test_values(solver):
    # Nothing is kept of the steps but what is asked for.
    max_steps = 4096

    def values(y0):
        return diffrax.diffeqsolve(
            ODETerm(lambda t, y, args: -jnp.sin(y)),
            solver,
            *(0.0, 1.0, None, y0),
            saveat=diffrax.SaveAt(ts=jnp.linspace(0, 1, 5)),
            stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-4),
            adjoint=DeerAdjoint(),
            max_steps=max_steps,
        ).ys

    y0 = jax.ShapeDtypeStruct((2,), jnp.float64)
    compiled: Any = jax.jit(values).lower(y0).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * max_steps
