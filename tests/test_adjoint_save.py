"""Saving with `DeerAdjoint`: any number of points, at once."""

import os
import re
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import pytest
from diffrax import ODETerm
from diffrax_deer import (
    AssociativeScan,
    ConstantGuess,
    DeerAdjoint,
    DeerSolver,
    SequentialScan,
)

from .helpers import deer, diffeqsolve, problem, SaveAt


euler = diffrax.Euler()


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
