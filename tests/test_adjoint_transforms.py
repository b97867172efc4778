"""`DeerAdjoint` in batches, in forward mode and more than once."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from diffrax_deer import DeerAdjoint

from .helpers import deer, diffeqsolve, max_error, problem, SaveAt, weighted_sum


direct = diffrax.DirectAdjoint()
constant = diffrax.ConstantStepSize()
adaptive = diffrax.PIDController(rtol=1e-2, atol=1e-4)
euler = diffrax.Euler()
heun = diffrax.Heun()
in_groups = DeerAdjoint(max_window_points=4)


# A smaller problem, for what takes long to compile.


def _flat_loss(x, solver, controller, adjoint):
    y0, args, t1 = x[:3], x[3], x[4]
    sol = diffeqsolve(
        problem()[0],
        solver,
        0,
        t1,
        0.13,
        y0,
        args,
        saveat=SaveAt(ts=t1 * jnp.linspace(0, 0.97, 8), t1=True),
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=16,
    )
    return weighted_sum(sol.ys)


flat_inputs = jnp.array([1.0, -0.5, 0.3, 0.9, 1.25])
_flat_value_and_grad = eqx.filter_jit(jax.value_and_grad(_flat_loss))


@pytest.mark.parametrize(
    "solver,controller,adjoint,reference",
    (
        (heun, adaptive, in_groups, heun),
        (deer(heun), adaptive, DeerAdjoint(), heun),
        (deer(heun), constant, in_groups, heun),
    ),
    ids=("plain", "adaptive", "merged"),
)
def test_vmap(solver, controller, adjoint, reference):
    # Of constant steps these need 16, 8, 1, and none.
    xs = flat_inputs * jnp.array([[0.5], [2.0], [-1.0], [0.7]])
    xs = xs.at[:, 4].set(jnp.array([2.0, 1.0, 0.1, 0.0]))
    args = (solver, controller, adjoint)
    batched = jax.jit(jax.vmap(lambda x: _flat_value_and_grad(x, *args)))
    for x, value, grad in zip(xs, *batched(xs)):
        expected, expected_grad = _flat_value_and_grad(x, reference, controller, direct)
        if x[4] == 0:
            # With a negative `t1` this would be integrated backwards in time.
            grad, expected_grad = grad[:4], expected_grad[:4]
        assert max_error(value, expected) < 1e-9
        assert max_error(grad, expected_grad) < 1e-9


@pytest.fixture(scope="module")
def hessian():
    return eqx.filter_jit(jax.hessian(_flat_loss))(flat_inputs, euler, constant, direct)


@pytest.mark.parametrize(
    "outer,solver",
    ((jax.jacrev, deer(euler)), (jax.jacfwd, euler)),
    ids=("deer", "euler"),
)
def test_hessian(outer, solver, hessian):
    fn = eqx.filter_jit(outer(jax.jacrev(_flat_loss)))
    actual = fn(flat_inputs, solver, constant, in_groups)
    assert max_error(actual, hessian) < 1e-9
    assert max_error(actual, actual.T) < 1e-12


def test_forward_mode():
    # As in `test_vmap`, so that the reference is compiled already.
    fn = lambda x: _flat_loss(x, deer(heun), constant, in_groups)
    direction = jnp.array([0.3, -0.8, 0.5, 0.2, -0.4])
    _, tangent = jax.jit(lambda x, v: jax.jvp(fn, (x,), (v,)))(flat_inputs, direction)
    _, grad = _flat_value_and_grad(flat_inputs, heun, constant, direct)
    assert abs(tangent - jnp.vdot(grad, direction)) < 1e-9 * abs(tangent)
