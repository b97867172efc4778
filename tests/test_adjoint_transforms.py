"""`DeerAdjoint` in batches, in forward mode and more than once."""

from functools import partial

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from diffrax_deer import DeerAdjoint
from diffrax_deer._adjoint.trajectory import linear_loop

from .helpers import deer, diffeqsolve, max_error, problem, SaveAt, weighted_sum


direct = diffrax.DirectAdjoint()
constant = diffrax.ConstantStepSize()
adaptive = diffrax.PIDController(rtol=1e-2, atol=1e-4)
euler = diffrax.Euler()
heun = diffrax.Heun()
in_groups = DeerAdjoint(max_window_points=4)


@pytest.mark.parametrize(
    "outer,inner",
    (
        (jax.jacrev, jax.jacrev),
        (jax.jacfwd, jax.jacrev),
        (jax.jacfwd, jax.jacfwd),
        (jax.jacrev, jax.jacfwd),
    ),
)
def test_linear_loop(outer, inner):
    xs, numbers = jnp.linspace(0.1, 0.9, 7), jnp.array([0, 2, 7])

    def body(weights, number, carry, index, x):
        # Others in a batch may go on for longer.
        y, total = carry
        new = jnp.stack([jnp.sin(weights[0] * x) * y[1], weights[1] * y[0] - y[1]])
        y = jnp.where(index < number, new, y)
        return y, total.at[index].add(jnp.where(index < number, y, 0))

    def loop(weights, y, number):
        carry = y, jnp.zeros((7, 2))
        return linear_loop(partial(body, weights, number), carry, xs, number)[1]

    def scan(weights, y, number):
        step = lambda carry, inputs: (body(weights, number, carry, *inputs), None)
        carry = y, jnp.zeros((7, 2))
        return jax.lax.scan(step, carry, (jnp.arange(7), xs))[0][1]

    def second(fn):
        # What is differentiated, too, is only a part of what it is linear in.
        weighted = lambda x, number: weighted_sum(jnp.exp(fn(x[:2], x[1:], number)))
        return jax.vmap(outer(inner(weighted)), in_axes=(None, 0))

    x = jnp.array([0.3, -0.8, 1.2])
    actual, expected = (jax.jit(second(fn))(x, numbers) for fn in (loop, scan))
    assert jnp.abs(expected[1:]).min() > 1e-3
    assert max_error(actual, expected) < 1e-12
    fn = jax.jit(jax.vmap(loop, in_axes=(None, None, 0)))
    expected = jax.vmap(scan, in_axes=(None, None, 0))(x[:2], x[1:], numbers)
    assert max_error(fn(x[:2], x[1:], numbers), expected) < 1e-14


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
