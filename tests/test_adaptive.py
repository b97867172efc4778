"""Windows chosen by a step size controller, on problems that one window cannot take."""

from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from diffrax import ODETerm
from diffrax_deer import DeerSolver

from .helpers import (
    diffeqsolve,
    exact,
    lorenz,
    max_error,
    SaveAt,
    sequential,
    van_der_pol,
)


@eqx.filter_jit
def _solve(vector_field, solver, t1, y0, args, controller, saveat=SaveAt(t1=True)):
    return diffeqsolve(
        ODETerm(vector_field),
        solver,
        0,
        t1,
        None,
        y0,
        args,
        saveat=saveat,
        stepsize_controller=controller,
        max_steps=20_000,
    )


@pytest.fixture(scope="module")
def van_der_pol_solution():
    y0 = jnp.array([2.0, 0.0])
    return exact(ODETerm(van_der_pol), 0, 100, y0, 50.0).ys


@pytest.fixture(scope="module")
def lorenz_solution():
    return exact(ODETerm(lorenz), 0, 10, jnp.ones(3)).ys


@pytest.mark.parametrize("substeps", (8, 64))
def test_stiff(substeps, van_der_pol_solution):
    controller = diffrax.PIDController(rtol=1e-6, atol=1e-8)
    solver = DeerSolver(diffrax.Tsit5(), substeps)
    y0 = jnp.array([2.0, 0.0])
    sol = _solve(van_der_pol, solver, 100.0, y0, 50.0, controller)
    assert max_error(sol.ys, van_der_pol_solution) < 1e-4
    # Tsit5 itself needs 3667 steps, so this many windows would do.
    assert sol.stats["num_accepted_steps"] < 4 * (3667 / substeps)


@pytest.mark.parametrize("substeps", (16, 128))
def test_chaotic(substeps, lorenz_solution):
    # Errors grow by four orders of magnitude.
    controller = diffrax.PIDController(rtol=1e-8, atol=1e-10)
    solver = DeerSolver(diffrax.Tsit5(), substeps)
    sol = _solve(lorenz, solver, 10.0, jnp.ones(3), None, controller)
    assert max_error(sol.ys, lorenz_solution) < 1e-4


def test_unstable():
    # With these steps, Tsit5 amplifies every difference from the slow solution. To damp
    # them, as the differential equation does, would be nicer but wrong; and would leave
    # it to derivatives to explode.
    term = ODETerm(lambda t, y, args: -50 * (y - jnp.cos(t)))
    ts = np.linspace(0, 1, 11)
    y0 = jnp.array([1.0])
    deer = diffeqsolve(term, DeerSolver(diffrax.Tsit5(), 10), 0, 1, 1, y0)
    ref = sequential(term, diffrax.Tsit5(), ts, y0)
    assert abs(ref.ys[0, 0]) > 100
    assert max_error(deer.ys, ref.ys) < 1e-10


@pytest.mark.parametrize("forcing", (0.0, 1.0))
def test_error_estimate(forcing):
    # Around a circle errors point in all directions, under a force in only one.
    def vector_field(t, y, args):
        circle = jnp.stack([-y[1], y[0]])
        return (1 - forcing) * circle + forcing * jnp.stack([jnp.exp(t), 1 + t])

    term, y0 = ODETerm(vector_field), jnp.array([1.0, 0.5])
    solver = DeerSolver(diffrax.Bosh3(), 64)
    ts = jnp.linspace(0.0, 6.0, 65)
    state = solver.init(term, ts[0], ts[-1], y0, None)
    step = eqx.filter_jit(solver.step)
    y_error: Any
    _, y_error, *_ = step(term, ts[0], ts[-1], y0, None, state, False)

    errors, ys, y = [], [y0], y0
    bosh3 = eqx.filter_jit(diffrax.Bosh3().step)
    for t0, t1 in zip(ts[:-1], ts[1:]):
        state = diffrax.Bosh3().init(term, t0, t1, y, None)
        y, error, *_ = bosh3(term, t0, t1, y, None, state, True)
        errors.append(error)
        ys.append(y)
    ys, errors = np.abs(np.stack(ys)), np.stack(errors)
    # Relative to what the controller is going to compare with.
    size, at_ends = np.maximum(ys[:-1], ys[1:]), np.maximum(ys[0], ys[-1])
    errors = errors * np.minimum(1, at_ends / size)
    systematic = np.abs(errors.sum(0))
    random = np.sqrt((errors**2).sum(0))
    assert (systematic > 5 * random).any() == (forcing == 1.0)
    expected = np.maximum(systematic, random)
    np.testing.assert_allclose(y_error, expected, rtol=1e-9)


def test_symplectic():
    # DEER changes how the numbers are found, never which: so energy does not drift.
    terms = (
        ODETerm(lambda t, v, args: v),
        ODETerm(lambda t, x, args: -jnp.sin(x)),
    )
    energy = lambda y: y[1] ** 2 / 2 - jnp.cos(y[0])
    y0 = (jnp.array(1.0), jnp.array(0.0))
    sol = diffeqsolve(
        terms,
        DeerSolver(diffrax.SemiImplicitEuler(), 100),
        0,
        200,
        10,
        y0,
        saveat=SaveAt(ts=jnp.linspace(0, 200, 201)),
    )
    drift = energy(sol.ys) - energy(y0)
    assert jnp.max(jnp.abs(drift)) < 0.05
    assert jnp.abs(jnp.mean(drift[-50:]) - jnp.mean(drift[:50])) < 2e-3
