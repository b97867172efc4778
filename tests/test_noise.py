"""Rounding errors which are larger than those of the state, as those of matrix products
are, by default, on GPUs."""

import diffrax
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import pytest
from diffrax import ODETerm
from diffrax_deer import (
    ConstantGuess,
    DEER,
    deer_scan_solution,
    DeerAdjoint,
    DeerSolver,
    QuasiDEER,
)
from diffrax_deer._implicit.linear import refine

from .helpers import diffeqsolve, max_error


SIZE, SUBSTEPS = 8, 200
weight = jr.normal(jr.key(0), (SIZE, SIZE), jnp.float32) / SIZE**0.5
y0 = jnp.linspace(-1, 1, SIZE, dtype=jnp.float32)


def _low(x):
    # What Nvidia GPUs do to single precision: ten bits are left.
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)


def _matvec(weight, x):
    return jnp.sum(_low(weight) * _low(x), axis=-1)


def _vector_field(t, y, args):
    return jnp.tanh(_matvec(weight, y)) - 0.1 * y + 0.1 * jnp.cos(t)


@pytest.mark.parametrize("method", (DEER(), QuasiDEER()))
def test_windows(method):
    times = jnp.float32(0), jnp.float32(10), jnp.float32(10)

    def solve(solver, dt0, y0):
        sol = diffeqsolve(
            *(ODETerm(_vector_field), solver, *times[:2], dt0, y0),
            max_steps=SUBSTEPS + 1,
            adjoint=DeerAdjoint(),
        )
        return sol.ys, sol.stats

    guess = ConstantGuess()
    solver = DeerSolver(diffrax.Tsit5(), SUBSTEPS, method=method, guess=guess)
    ys, stats = solve(solver, times[2], y0)
    sequential, _ = solve(diffrax.Tsit5(), times[2] / SUBSTEPS, y0)
    # Otherwise nearly as many as there are substeps.
    assert stats["num_iterations"] <= 20
    assert max_error(ys, sequential) < 2e-3


@pytest.mark.parametrize("method", (DEER(), QuasiDEER()))
def test_recurrences(method):
    def f(h, x):
        gate = jax.nn.sigmoid(_matvec(weight, h) + x)
        return h + gate * (jnp.tanh(_matvec(-weight, h) + 2 * x) - h), None

    xs = jr.normal(jr.key(1), (1000, SIZE), jnp.float32)
    solution = deer_scan_solution(f, jnp.zeros_like(y0), xs, method=method)
    carry, _ = lax.scan(f, jnp.zeros_like(y0), xs)
    assert solution.num_iterations <= 20
    assert max_error(solution.carry, carry) < 1e-3


def test_linear_recurrences():
    count = []
    As = jr.normal(jr.key(2), (300, SIZE, SIZE), jnp.float32) / (2 * SIZE**0.5)
    b = jr.normal(jr.key(3), (300, SIZE), jnp.float32)

    def product(x):
        jax.debug.callback(lambda: count.append(None))
        x = x.reshape(b.shape)
        starts = jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])
        return jax.vmap(_matvec)(As, starts).reshape(-1)

    def solve(b):
        step = lambda x, A_b: (A_b[0] @ x + A_b[1],) * 2
        b = b.reshape(300, SIZE)
        return lax.scan(step, jnp.zeros_like(b[0]), (As, b))[1].reshape(-1)

    x = refine(product, solve, b.reshape(-1), SIZE, 300)
    jax.effects_barrier()
    # Otherwise as many as there are terms.
    assert len(count) <= 20
    assert max_error(x, product(x) + b.reshape(-1)) < 1e-2
