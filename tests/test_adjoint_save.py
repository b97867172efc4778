"""Saving with `DeerAdjoint`: any number of points, at once."""

import os
import re
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest
from diffrax import ODETerm
from diffrax_deer import (
    AssociativeScan,
    ConstantGuess,
    DeerAdjoint,
    DeerSolver,
    SequentialScan,
)

from .helpers import deer, diffeqsolve, max_error, problem, SaveAt


euler = diffrax.Euler()
direct = diffrax.DirectAdjoint()


@pytest.mark.parametrize(
    "solver,steps",
    ((euler, 1000), (deer(euler), 100), (deer(euler), 1000)),
    ids=("euler", "deer-100", "deer-1000"),
)
def test_step_aligned_saves(solver, steps):
    # Diffrax's default adjoint drops the gradient of many of these.
    @jax.jit
    @jax.grad
    def grad(y0):
        sol = diffeqsolve(
            ODETerm(lambda t, y, args: 0 * y),
            solver,
            0,
            10,
            10 / steps,
            y0,
            saveat=SaveAt(ts=jnp.linspace(0, 10, steps + 1)),
            adjoint=DeerAdjoint(),
        )
        return jnp.sum(sol.ys)

    assert grad(1.0) == steps + 1


@pytest.mark.parametrize(
    "solver",
    (diffrax.Heun(), deer(diffrax.Heun()), DeerSolver(diffrax.Heun(), 8)),
    ids=("heun", "merged", "windows"),
)
def test_saves_at_rounded_ends(solver):
    # Steps of which some end a rounding error before a save time, and some after it,
    # depending on how XLA arranges the arithmetic.
    ts, weights = jnp.linspace(0, 63, 50), jnp.cos(jnp.arange(50))

    @eqx.filter_jit
    def value_and_grad(adjoint):
        def loss(y0, decay):
            sol = diffeqsolve(
                *(ODETerm(lambda t, y, decay: jnp.cos(t) - decay * y), solver),
                *(0, 63, 63 / 49, y0, decay),
                saveat=SaveAt(ts=ts),
                adjoint=adjoint,
                max_steps=64,
            )
            return jnp.sum(weights * sol.ys), sol.ys

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(1.0, 0.1)

    actual, expected = value_and_grad(DeerAdjoint()), value_and_grad(direct)
    assert max_error(actual, expected) < 1e-12


@pytest.mark.parametrize("max_steps", (256, 2), ids=("all", "some"))
def test_many_saves(max_steps):
    # Hundreds in some of the steps, and none in others; and some steps that fail.
    term, y0, args = problem()
    late = 0.5 + jnp.linspace(0, 1, 701) ** 3
    ts = jnp.concatenate([jnp.linspace(0, 0.01, 300), late, late[-1:]])
    y0s = jtu.tree_map(lambda x: jnp.stack([x, 0.3 * x, 3 * x]), y0)

    @eqx.filter_jit
    def solve(adjoint):
        def one(y0):
            return diffeqsolve(
                *(term, diffrax.Dopri8(), 0, 2, 0.1, y0, args),
                saveat=SaveAt(ts=ts),
                stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
                adjoint=adjoint,
                max_steps=max_steps,
                throw=False,
            )

        return jax.vmap(one)(y0s)

    expected, actual = solve(direct), solve(DeerAdjoint())
    is_saved = jnp.isfinite(expected.ts)
    assert jnp.all(is_saved) == (max_steps == 256)
    if max_steps == 256:
        # In steps that differ from one to the other of the batch.
        assert len(set(expected.stats["num_steps"].tolist())) > 1
    assert jnp.all(jnp.isfinite(actual.ts) == is_saved)
    assert (
        max_error(
            jtu.tree_map(lambda y: y[is_saved], actual.ys),
            jtu.tree_map(lambda y: y[is_saved], expected.ys),
        )
        < 1e-8
    )


def test_no_loops(monkeypatch):
    # No scan over the saves, and none over the steps that has not been asked for, where
    # the platform is not one for which these are the best.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    term, y0, args = problem()

    def long_loops(scan):
        @jax.jit
        @jax.grad
        def grad(y0):
            sol = diffeqsolve(
                term,
                DeerSolver(euler, 1, scan=scan, guess=ConstantGuess()),
                0,
                3,
                0.01,
                y0,
                args,
                saveat=SaveAt(ts=jnp.linspace(0, 3, 200)),
                adjoint=DeerAdjoint(),
                max_steps=300,
            )
            return jnp.sum(sol.ys)

        # As without the flags of `conftest.py`, of which one turns scatters into loops.
        is_flag = "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", "")
        options: Any = dict(xla_cpu_use_fusion_emitters=True) if is_flag else None
        text = grad.lower(y0).compile(options).as_text() or ""
        counts = re.findall(r'known_trip_count":\{"n":"(\d+)"', text)
        # The iteration is the only one of which it is not known how often it runs.
        assert text.count(" while(") == len(counts) + 1
        # Others are bisections.
        return [int(n) for n in counts if int(n) > 32]

    # Of the linear recurrence, once forwards and once backwards.
    assert long_loops(SequentialScan()) == [300, 300]
    assert long_loops(AssociativeScan()) == []
