"""Gauss--Legendre and Radau IIA collocation, by themselves and with joined stages."""

from typing import Any, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffrax import ODETerm
from diffrax_deer import (
    ConstantGuess,
    DEER,
    DeerAdjoint,
    DeerSolver,
    GaussLegendre,
    QuasiDEER,
    RadauIIA,
)

from .helpers import (
    deer,
    diffeqsolve,
    exact,
    max_error,
    problem,
    SaveAt,
    sequential,
    solver_id,
    van_der_pol,
    weighted_sum,
)


gauss, radau = GaussLegendre, RadauIIA
collocations = (
    gauss(1),
    gauss(2),
    gauss(3),
    gauss(4),
    radau(1),
    radau(2),
    radau(3),
    radau(4),
)


def _id(solver):
    return f"{type(solver).__name__}-{solver.stages}"


@pytest.mark.parametrize("solver", collocations, ids=_id)
def test_coefficients(solver):
    A, b, c, b_error = solver.coefficients(solver.stages)
    for k in range(1, solver.order(None) + 1):
        assert abs(b @ c ** (k - 1) - 1 / k) < 1e-14
    for k in range(1, solver.stages + 1):
        np.testing.assert_allclose(A @ c ** (k - 1), c**k / k, atol=1e-14)
    for k in range(solver.stages - 1):
        assert abs(b_error @ c**k) < 1e-14
    # Known in closed form.
    if solver == gauss(2):
        np.testing.assert_allclose(c, [0.5 - 3**0.5 / 6, 0.5 + 3**0.5 / 6])
        np.testing.assert_allclose(A[0], [0.25, 0.25 - 3**0.5 / 6])
    if solver == radau(2):
        np.testing.assert_allclose(A, [[5 / 12, -1 / 12], [3 / 4, 1 / 4]], atol=1e-14)


@eqx.filter_jit
def _solve(solver, substeps):
    term, y0, args = problem()
    solver = DeerSolver(solver, substeps, guess=ConstantGuess())
    return diffeqsolve(
        *(term, solver, 0, 4, 4, y0, args),
        saveat=SaveAt(ts=jnp.linspace(0, 4, 9), dense=True, solver_state=True),
        max_steps=1,
    )


@pytest.mark.parametrize("solver", (gauss(1), gauss(4), radau(1), radau(3)), ids=_id)
def test_same_as_sequential(solver):
    term, y0, args = problem()
    ts = np.linspace(0, 4, 13)
    saveat = SaveAt(ts=np.linspace(0, 4, 9), dense=True)
    ref = sequential(term, solver, ts, y0, args, saveat=saveat)
    sol = _solve(solver, 12)
    assert max_error(sol.ys, ref.ys) < 1e-10
    assert max_error(sol.evaluate(1.2345), ref.evaluate(1.2345)) < 1e-10
    assert max_error(sol.derivative(1.2345), ref.derivative(1.2345)) < 1e-9


@pytest.mark.parametrize("solver", (gauss(4), diffrax.Tsit5()), ids=solver_id)
def test_products_are_precise(solver):
    # A GPU would round single precision to 10 bits first, unless told otherwise.
    _, y0, _ = problem(jnp.float32)
    term = ODETerm(lambda t, y, args: jax.tree_util.tree_map(jnp.sin, y))

    def loss(y0):
        saveat, adjoint = SaveAt(ts=jnp.linspace(0, 4, 9)), DeerAdjoint()
        sol = diffeqsolve(
            *(term, deer(solver, 12), 0, 4, 4, y0), saveat=saveat, adjoint=adjoint
        )
        return weighted_sum(sol.ys)

    lines = jax.jit(jax.grad(loss)).lower(y0).as_text().splitlines()
    products = [line for line in lines if "dot_general" in line]
    assert len(products) > 0
    assert all("HIGHEST, HIGHEST" in line for line in products)


# That of the others follows from `test_coefficients`.
@pytest.mark.parametrize("solver", (gauss(3), radau(2)), ids=_id)
def test_order(solver):
    term, y0, args = problem()
    saveat = SaveAt(ts=jnp.linspace(0, 4, 9))
    true = exact(term, 0, 4, y0, args, saveat=saveat).ys[-1]
    order = solver.order(term)
    substeps = (12, 18, 24)
    errors = [max_error(_solve(solver, n).ys[-1], true) for n in substeps]
    slope, _ = np.polyfit(np.log(substeps), np.log(errors), 1)
    assert abs(-slope - order) < 0.5


def test_energy():
    # Of a Kepler orbit, over a thousand periods: it does not drift.
    def kepler(t, y, args):
        q, p = y
        return p, -q / jnp.sum(q**2) ** 1.5

    def energy(y):
        q, p = y
        r = jnp.sqrt(jnp.sum(q**2, axis=-1))
        return jnp.sum(p**2, axis=-1) / 2 - 1 / r

    # Windows end at any phase of the orbit.
    e, windows = 0.3, 617
    y0 = (jnp.array([1 - e, 0.0]), jnp.array([0.0, ((1 + e) / (1 - e)) ** 0.5]))
    t1 = 1000 * 2 * jnp.pi
    sol = diffeqsolve(
        ODETerm(kepler),
        DeerSolver(gauss(4), 32, guess=ConstantGuess()),
        0,
        t1,
        t1 / windows,
        y0,
        saveat=SaveAt(steps=True),
        max_steps=windows + 1,
    )
    energies = energy(jax.tree_util.tree_map(lambda y: y[:windows], sol.ys))
    error = jnp.abs(energies - energy(y0))
    assert jnp.max(error) < 1e-4
    # Nothing adds up.
    assert jnp.max(error[-60:]) < 1.5 * jnp.max(error[:60])


@pytest.mark.parametrize("solver", (radau(2), radau(3)), ids=_id)
def test_stiff(solver):
    # In steps that are far longer than the fast time scale.
    y0, mu = jnp.array([2.0, 0.0]), 1e3
    true = diffeqsolve(
        *(ODETerm(van_der_pol), diffrax.Kvaerno5(), 0, 500, None, y0, mu),
        stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-9),
        max_steps=100_000,
    ).ys
    solver = DeerSolver(solver, 16, guess=ConstantGuess())
    sol = diffeqsolve(
        *(ODETerm(van_der_pol), solver, 0, 500, 0.1, y0, mu),
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
        max_steps=200,
    )
    assert max_error(sol.ys[:, 0], true[:, 0]) < 1e-4


@pytest.mark.parametrize("substeps", (15, 16))
def test_adaptive(substeps):
    # By the embedded error estimate, and by halving.
    term, y0, args = problem()
    controller = diffrax.PIDController(rtol=1e-6, atol=1e-8)
    solver = DeerSolver(gauss(3), substeps, guess=ConstantGuess())
    sol = diffeqsolve(
        *(term, solver, 0, 20, 0.1, y0, args), stepsize_controller=controller
    )
    assert max_error(sol.ys, exact(term, 0, 20, y0, args).ys) < 1e-5
    by_itself = diffeqsolve(
        *(term, gauss(3), 0, 20, 0.1, y0, args), stepsize_controller=controller
    )
    assert max_error(by_itself.ys, exact(term, 0, 20, y0, args).ys) < 1e-4


def test_error_by_halving():
    # Of the full order: what is left is the error of the coarser grid.
    term, y0, args = problem()
    solver = DeerSolver(gauss(2), 16, guess=ConstantGuess())
    t0, t1 = jnp.array(0.0), jnp.array(4.0)
    state = solver.init(term, t0, t1, y0, args)
    _, y_error, *_ = eqx.filter_jit(solver.step)(term, t0, t1, y0, args, state, False)
    true = exact(term, 0, 4, y0, args).ys[0]
    coarse = sequential(term, gauss(2), np.linspace(0, 4, 9), y0, args).ys[0]
    assert max_error(y_error, jnp.abs(coarse - true)) < 0.1
    assert solver.error_order(term) == 5


@eqx.filter_jit
@jax.grad
def _grad(inputs, solver, adjoint, dt0):
    y0, args = inputs
    sol = diffeqsolve(
        *(problem()[0], solver, 0, 4, dt0, y0, args),
        saveat=SaveAt(ts=jnp.array([0.7, 4.0])),
        adjoint=adjoint,
        max_steps=16,
    )
    return jnp.sum(jnp.sin(sol.ys))


@pytest.mark.parametrize(
    "method,adjoint",
    (
        (DEER(), DeerAdjoint()),
        (DEER(), diffrax.DirectAdjoint()),
        (QuasiDEER(), DeerAdjoint()),
    ),
)
def test_gradient(method, adjoint):
    _, *inputs = problem()
    expected = _grad(inputs, gauss(2), diffrax.DirectAdjoint(), 0.5)
    actual = _grad(inputs, deer(gauss(2), 8, method=method), adjoint, 4.0)
    assert max_error(actual, expected) < 1e-8


@pytest.mark.parametrize(
    "make,error,message",
    (
        (lambda: gauss(0), ValueError, r"GaussLegendre\(stages=...\).*at least 1"),
        (lambda: radau(-1), ValueError, r"RadauIIA\(stages=...\)"),
        (lambda: gauss(cast(Any, 2.0)), TypeError, r"GaussLegendre\(stages=...\)"),
        (lambda: radau(cast(Any, True)), TypeError, r"RadauIIA\(stages=...\)"),
    ),
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "solver", (gauss(1), radau(1), DeerSolver(gauss(1), 3)), ids=("G", "R", "deer")
)
def test_one_stage_has_no_error_estimate(solver):
    term, y0, args = problem()
    controller = diffrax.PIDController(rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"\(stages=1\).*no error.*\(stages=2\)"):
        diffeqsolve(
            *(term, solver, 0, 1, 0.1, y0, args), stepsize_controller=controller
        )
    # Constant steps do not need one.
    diffeqsolve(term, solver, 0, 1, 0.1, y0, args)


def test_one_stage_and_an_even_number_of_substeps():
    term, y0, args = problem()
    controller = diffrax.PIDController(rtol=1e-4, atol=1e-4)
    halving = DeerSolver(gauss(1), 4)
    diffeqsolve(term, halving, 0, 1, 0.1, y0, args, stepsize_controller=controller)
