"""Problems of the literature, from `diffeqzoo`, as users would solve them."""

from typing import Any, cast

import diffrax
import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from diffeqzoo import backend, ivps
from diffrax import ODETerm, SubSaveAt
from diffrax_deer import DeerSolver

from .helpers import diffeqsolve, exact, max_error, SaveAt, sequential


if not cast(Any, backend).has_been_selected:
    cast(Any, backend).select("jax")

# With the final time, and by how much an error grows until then.
problems = {
    "affine_independent": (1.0, 1),
    "fitzhugh_nagumo": (20.0, 10),
    "henon_heiles_first_order": (20.0, 10),
    "hires": (20.0, 1),
    "lotka_volterra": (20.0, 100),
    "pleiades_first_order": (2.0, 1000),
    "rigid_body": (20.0, 100),
    "roessler": (10.0, 10),
    "sir": (100.0, 10),
    "three_body_restricted_first_order": (5.0, 1e4),
}


def _problem(name):
    f, y0, _, params = getattr(ivps, name)()
    y0 = jnp.asarray(y0, jnp.float64)
    return ODETerm(lambda t, y, args: f(y, *params)), y0


@eqx.filter_jit
def _solve(term, solver, y0, t1, controller, saveat):
    return diffeqsolve(
        term,
        solver,
        0,
        t1,
        None,
        y0,
        stepsize_controller=controller,
        saveat=saveat,
        max_steps=10_000,
    )


@pytest.mark.parametrize("name", problems)
def test_adaptive(name):
    t1, growth = problems[name]
    term, y0 = _problem(name)
    # At given times, and where windows end.
    ts = jnp.linspace(0, t1, 50)
    at_ts, at_steps = SubSaveAt(ts=ts), SubSaveAt(t0=True, steps=True)
    controller = diffrax.PIDController(rtol=1e-7, atol=1e-9)
    solver = DeerSolver(diffrax.Tsit5(), 16)
    saveat = SaveAt(subs=[at_ts, at_steps])
    sol = _solve(term, solver, y0, t1, controller, saveat)
    true = exact(term, 0, t1, y0, saveat=SaveAt(ts=ts)).ys
    scale = jnp.max(jnp.abs(true), axis=0)
    assert max_error(sol.ys[0] / scale, true / scale) < 1e-6 * growth
    # Window after window, this is what Tsit5 returns on the same grid.
    edges = np.asarray(sol.ts[1])[: int(sol.stats["num_accepted_steps"]) + 1]
    ts = np.append(
        edges[:-1, None] + np.diff(edges)[:, None] * np.arange(16) / 16, edges[-1]
    )
    ref = sequential(term, diffrax.Tsit5(), ts, y0)
    final = sol.ys[1][len(edges) - 1]
    assert max_error(final / scale, ref.ys[0] / scale) < 1e-10 * growth
