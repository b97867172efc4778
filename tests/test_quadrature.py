"""Leaves of the state that no vector field reads."""

import functools as ft
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from diffrax import MultiTerm, ODETerm, RESULTS
from diffrax_deer import (
    AdaptiveGrid,
    AutoGuess,
    ConstantGuess,
    DeerAdjoint,
    DeerSolver,
    GaussLegendre,
    UniformGrid,
)
from diffrax_deer._window import leaves_read, quadrature, ravel

from .helpers import (
    diffeqsolve,
    max_error,
    root_finder,
    SaveAt,
    VectorField,
    weighted_sum,
)


tsit5 = diffrax.Tsit5()
euler = diffrax.Euler()
gauss = GaussLegendre(2, root_finder=root_finder)
kencarp3 = diffrax.KenCarp3(root_finder=root_finder)
direct = diffrax.DirectAdjoint()
constant = ConstantGuess()


class Flow(eqx.Module):
    """A normalising flow, with a cost, and with the integral of this cost."""

    field: VectorField

    def __call__(self, t, y, args):
        f = lambda x: self.field(t, x, args)
        return dict(
            log_p=-jnp.trace(jax.jacfwd(f)(y["x"])),
            x=f(y["x"]),
            cost=jnp.sum(y["x"] ** 2) * jnp.sin(t),
            total=jnp.stack([y["cost"], args * t]),
        )


def _problem(dtype=jnp.float64):
    weight = jnp.array([[-0.6, 1.1], [-1.3, 0.4]], dtype)
    zero = jnp.zeros((), dtype)
    x = jnp.array([1.0, -0.5], dtype)
    y0 = dict(log_p=zero, x=x, cost=zero + 0.3, total=jnp.ones(2, dtype))
    return ODETerm(Flow(VectorField(weight))), y0, jnp.array(0.9, dtype)


def _read(vector_field, y0):
    term = ODETerm(lambda t, y, args: vector_field(*y))
    return leaves_read(tsit5, term, 0.0, 1.0, y0, None)


def test_what_is_read():
    y0 = (jnp.ones(2), jnp.ones(2))
    for f in (
        lambda x, q: (lax.cond(x[0] > 0, lambda: x, lambda: x * q), x),
        lambda x, q: (lax.scan(lambda c, _: (c * q, None), x, None, 3)[0], x),
        lambda x, q: (lax.fori_loop(0, q[0].astype(int), lambda _, x: -x, x), x),
        lambda x, q: (x, q),
        lambda x, q: (x, jnp.where(q > 0, 1.0, 2.0)),
        lambda x, q: (x + 0 * q, x),
        lambda x, q: (q, x),
    ):
        assert _read(f, y0) == (True, True)
    for f in (
        lambda x, q: (lax.cond(x[0] > 0, lambda: x, lambda: -x), x),
        lambda x, q: (
            lax.scan(lambda c, _: ((c[0], -c[1]), 0.0), (x, q), None, 3)[0][0],
            x,
        ),
        lambda x, q: (jax.jit(lambda x, q: x)(x, q), x),
        lambda x, q: (x, jnp.zeros_like(q)),
    ):
        assert _read(f, y0) == (True, False)
    # There has to be something to solve for.
    assert _read(lambda x, q: (jnp.ones(2), jnp.ones(2)), y0) == (True, True)

    # Each of several parts reads.
    first = ODETerm(lambda t, y, args: (y[0], y[0], y[0]))
    second = ODETerm(lambda t, y, args: (-y[1], y[0], y[0]))
    y0 = (*y0, jnp.ones(2))
    reads = ft.partial(leaves_read, t0=0.0, t1=1.0, y0=y0, args=None)
    assert reads(kencarp3, MultiTerm(first, second)) == (True, True, False)
    assert reads(tsit5, first) == (True, False, False)
    # Of these nothing is known.
    assert reads(diffrax.SemiImplicitEuler(), (first, second)) == (True, True, True)


def _solve(inputs, solver, dt0, adjoint=direct, saveat=SaveAt(t1=True), **kwargs):
    term, y0, args = inputs
    kwargs = dict(saveat=saveat, adjoint=adjoint, max_steps=8) | kwargs
    return diffeqsolve(term, solver, 0.0, 1.0, dt0, y0, args, **kwargs)


@pytest.mark.parametrize(
    "solver, adjoint, max_bytes",
    (
        # As on a GPU, with two substeps at a time.
        (DeerSolver(tsit5, 4, guess=constant), direct, 2 * 7 * 3 * 8),
        # By one step after the other.
        (DeerSolver(tsit5, 4), DeerAdjoint(), 2**26),
        # With the trajectory kept.
        (DeerSolver(gauss, 4), DeerAdjoint(), 2**26),
    ),
)
def test_values_and_gradients(solver, adjoint, max_bytes, monkeypatch):
    monkeypatch.setattr(quadrature, "_MAX_BYTES", max_bytes)

    def loss(inputs, solver, dt0, adjoint):
        saveat = SaveAt(ts=jnp.array([0.3, 0.5, 0.9]), dense=True)
        sol = _solve(inputs, solver, dt0, adjoint, saveat)
        values = ravel(sol.ys, sol.ys), ravel(sol.evaluate(0.7), inputs[1])
        return sum(map(weighted_sum, values)), values

    @eqx.filter_jit
    def both(inputs):
        grad = eqx.filter_value_and_grad(loss, has_aux=True)
        actual = grad(inputs, solver, 0.5, adjoint)
        return actual, grad(inputs, solver.solver, 0.125, direct)

    assert max_error(*both(_problem())) < 1e-9


def test_they_are_no_unknowns():
    inputs = _problem()
    solver = DeerSolver(tsit5, 4, guess=constant)
    saveat = SaveAt(t1=True, solver_state=True)
    solve = lambda state: _solve(inputs, solver, 1.0, solver_state=state, saveat=saveat)
    state = solve(None).solver_state
    assert state.ys["log_p"] is None and state.ys["total"] is None
    assert state.ys["x"].shape == (4, 2) and state.ys["cost"].shape == (4,)
    assert solve(state).solver_state.num_iterations < state.num_iterations


def _pulse(t, y, args):
    # The rest of the state tells nothing of it.
    return dict(x=-y["x"], q=jnp.exp(-(((t - 0.4) / 0.05) ** 2)))


@pytest.mark.parametrize(
    "solver, grid",
    (
        (tsit5, UniformGrid()),
        # By halving.
        (gauss, UniformGrid()),
        (tsit5, AdaptiveGrid(rtol=1e-6, atol=1e-6)),
    ),
)
def test_errors_count(solver, grid):
    y0 = dict(x=jnp.ones(1), q=jnp.zeros(()))
    controller, substeps, dt0 = diffrax.PIDController(rtol=1e-6, atol=1e-6), 4, 0.2
    if not grid.is_uniform:
        controller, substeps, dt0 = diffrax.ConstantStepSize(), 64, 1.0
    solver = DeerSolver(solver, substeps, guess=constant, grid=grid)
    inputs = ODETerm(_pulse), y0, None
    sol = _solve(inputs, solver, dt0, stepsize_controller=controller, max_steps=64)
    assert abs(sol.ys["q"][0] - 0.05 * np.sqrt(np.pi)) < 1e-5


def test_nonfinite():
    # The logarithm of a number that is negative in the end.
    term = ODETerm(lambda t, y, args: (-y[0], jnp.log(y[0] - 0.5)))
    inputs = term, (jnp.ones(()), jnp.zeros(())), None
    solver = DeerSolver(tsit5, 4, guess=constant)
    sol = _solve(inputs, solver, 1.0, throw=False)
    assert sol.result == RESULTS.nonfinite
    assert all(jnp.isfinite(y).all() for y in sol.ys)


def test_nonfinite_at_the_end():
    # There is only the stage that the error estimate alone needs.
    term = ODETerm(lambda t, y, args: (-y[0], y[0] / jnp.sqrt(1 - t)))
    inputs = term, (jnp.ones(()), jnp.zeros(())), None
    bosh3 = diffrax.Bosh3()
    actual = _solve(inputs, DeerSolver(bosh3, 4, guess=constant), 1.0).ys
    expected = _solve(inputs, bosh3, 0.25).ys
    assert all(jnp.isfinite(y).all() for y in expected)
    assert max_error(actual, expected) < 1e-12


def test_batch_in_single_precision():
    term, y0, args = _problem(jnp.float32)
    batch = jtu.tree_map(lambda y: jnp.stack([y, -0.5 * y]), y0)
    solver = DeerSolver(tsit5, 4, guess=constant)

    @ft.partial(jax.vmap, in_axes=(0, None, None))
    def solve(y0, solver, dt0):
        t0, t1, dt0 = (jnp.asarray(t, jnp.float32) for t in (0, 1, dt0))
        return diffeqsolve(term, solver, t0, t1, dt0, y0, args, max_steps=8).ys

    actual, expected = solve(batch, solver, 0.5), solve(batch, tsit5, 0.125)
    assert all(y.dtype == jnp.float32 for y in jtu.tree_leaves(actual))
    assert max_error(actual, expected) < 1e-5


@pytest.mark.parametrize("guess", (AutoGuess(), constant))
def test_backsolve_through_a_large_network(guess):
    network = eqx.nn.MLP(2, 2, 310, 2, jax.nn.tanh, key=jr.key(0))
    params, static = eqx.partition(network, eqx.is_array)
    term = ODETerm(lambda t, y, args: eqx.combine(args, static)(y))
    solver = DeerSolver(tsit5, 128, guess=guess)

    def loss(params, adjoint):
        inputs = term, jnp.array([1.0, -0.5]), params
        return weighted_sum(_solve(inputs, solver, 1.0, adjoint).ys)

    grad = lambda adjoint: jax.jit(jax.grad(lambda params: loss(params, adjoint)))
    compiled: Any = grad(diffrax.BacksolveAdjoint()).lower(params).compile()
    # The stages of all substeps would take 700 MB.
    assert compiled.memory_analysis().temp_size_in_bytes < 2**28
    assert max_error(compiled(params), grad(DeerAdjoint())(params)) < 1e-6
