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
import pytest
from diffrax import MultiTerm, ODETerm, RESULTS
from diffrax_deer import (
    AdaptiveGrid,
    ConstantGuess,
    DeerAdjoint,
    DeerSolver,
    GaussLegendre,
)
from diffrax_deer._window import leaves_read, ravel
from jax.flatten_util import ravel_pytree

from .helpers import (
    diffeqsolve,
    max_error,
    root_finder,
    SaveAt,
    sequential,
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
    "solver, adjoint",
    (
        # As on a GPU; one step after the other; what is kept of the trajectory.
        (DeerSolver(tsit5, 4, guess=constant), direct),
        (DeerSolver(tsit5, 4), DeerAdjoint()),
        (DeerSolver(gauss, 4), DeerAdjoint()),
    ),
)
def test_values_and_gradients(solver, adjoint):
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
    term, y0, args = inputs = _problem()
    solver = DeerSolver(tsit5, 4, guess=constant)
    sol = _solve(inputs, solver, 1.0, saveat=SaveAt(t1=True, solver_state=True))
    state = sol.solver_state
    assert state.ys["log_p"] is None and state.ys["total"] is None
    assert state.ys["x"].shape == (4, 2) and state.ys["cost"].shape == (4,)
    again = _solve(inputs, solver, 1.0, saveat=saveat, solver_state=state)
    assert again.stats
