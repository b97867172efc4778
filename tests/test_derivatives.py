"""Derivatives, against `DirectAdjoint` or finite differences."""

import functools as ft
from typing import Any, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from diffrax import ODETerm
from diffrax_deer import AssociativeScan, DEER, DeerAdjoint, DeerSolver, QuasiDEER
from jax.flatten_util import ravel_pytree

from .helpers import (
    diffeqsolve,
    max_error,
    problem,
    root_finder,
    SaveAt,
    sequential,
    split_problem,
    van_der_pol,
    weighted_sum,
)


t0, t1 = 0.1, 2.1
# Not at the ends of windows, see the comment in `test_step_aligned_saves`.
save_ts = np.linspace(t0, t1, 6) - np.array([-0.1, 0.13, 0.13, 0.13, 0.13, 0.13])
adaptive = diffrax.PIDController(rtol=1e-3, atol=1e-5)
constant = diffrax.ConstantStepSize()


def _inputs() -> dict[str, Any]:
    term, y0, args = problem()
    return dict(y0=y0, args=args, term=term, t0=jnp.array(t0), t1=jnp.array(t1))


def _loss(inputs, solver, controller, adjoint, saveat=SaveAt(ts=save_ts), windows=4):
    # A single window has to be longer than the interval: of `min(t0 + dt0, t1)`, which
    # is what Diffrax computes, the derivative at equality is one half.
    dt0 = (t1 - t0) / windows if windows > 1 else 2 * (t1 - t0)
    sol = diffeqsolve(
        inputs["term"],
        solver,
        inputs["t0"],
        inputs["t1"],
        dt0,
        inputs["y0"],
        inputs["args"],
        saveat=saveat,
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=16,
    )
    return weighted_sum(sol.ys)


def _sequential_loss(inputs, solver, substeps, saveat=SaveAt(ts=save_ts), windows=4):
    # The windows as Diffrax makes them: the first is of length `dt0`, the others divide
    # the interval equally.
    edges = inputs["t0"] + (inputs["t1"] - inputs["t0"]) * np.linspace(
        0, 1, windows + 1
    )
    if windows > 1:
        edges = edges.at[1].set(inputs["t0"] + (t1 - t0) / windows)
    fractions = np.arange(substeps) / substeps
    ts = edges[:-1, None] + jnp.diff(edges)[:, None] * fractions
    ts = jnp.append(ts.reshape(-1), inputs["t1"])
    sol = sequential(
        inputs["term"],
        solver,
        ts,
        inputs["y0"],
        inputs["args"],
        saveat=saveat,
        adjoint=diffrax.DirectAdjoint(),
    )
    return weighted_sum(sol.ys)


_value = eqx.filter_jit(_loss)
_grad = eqx.filter_jit(eqx.filter_grad(_loss))
_sequential_grad = eqx.filter_jit(eqx.filter_grad(_sequential_loss))


@eqx.filter_jit
def _jvp(inputs, direction, *args):
    return eqx.filter_jvp(lambda x: _loss(x, *args), (inputs,), (direction,))[1]


def _dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jtu.tree_leaves(a), jtu.tree_leaves(b)))


def _gradient_error(x, y):
    # Relative to the largest entry, as that for `t1` is very nearly zero.
    return max_error(ravel_pytree(x)[0], ravel_pytree(y)[0])


def _direction(inputs):
    inputs = eqx.filter(inputs, eqx.is_array)
    leaves, treedef = jtu.tree_flatten(inputs)
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(rng.normal(size=x.shape)) for x in leaves]
    return jtu.tree_unflatten(treedef, leaves)


def _finite_difference(inputs, direction, *args, eps=1e-5):
    def along(eps):
        shifted = eqx.apply_updates(inputs, jtu.tree_map(lambda x: eps * x, direction))
        return _value(shifted, *args)

    return (along(eps) - along(-eps)) / (2 * eps)


@pytest.fixture(scope="module")
def reference():
    """The gradient of sequential steps, with all adjoints of Diffrax out of the way."""
    return _sequential_grad(_inputs(), diffrax.Tsit5(), 8)


tsit5 = DeerSolver(diffrax.Tsit5(), substeps=8)


@pytest.mark.parametrize(
    "adjoint",
    (
        diffrax.RecursiveCheckpointAdjoint(),
        diffrax.DirectAdjoint(),
    ),
    ids=lambda x: type(x).__name__,
)
def test_reverse_mode(adjoint, reference):
    grad = _grad(_inputs(), tsit5, constant, adjoint)
    assert _gradient_error(grad, reference) < 1e-9


@pytest.mark.parametrize(
    "solver",
    (
        DeerSolver(diffrax.Tsit5(), 8, scan=AssociativeScan()),
        DeerSolver(diffrax.Kvaerno3(root_finder=root_finder), 8),
        DeerSolver(diffrax.Euler(), 8),
    ),
    ids=("Tsit5", "Kvaerno3", "Euler"),
)
def test_reverse_mode_of_solvers(solver):
    reference = _sequential_grad(_inputs(), solver.solver, 8)
    grad = _grad(_inputs(), solver, constant, diffrax.RecursiveCheckpointAdjoint())
    assert _gradient_error(grad, reference) < 1e-9


@pytest.mark.parametrize(
    "adjoint",
    (diffrax.ForwardMode(), diffrax.DirectAdjoint()),
    ids=lambda x: type(x).__name__,
)
def test_forward_mode(adjoint, reference):
    inputs = _inputs()
    direction = _direction(inputs)
    tangent = _jvp(inputs, direction, tsit5, constant, adjoint)
    assert abs(tangent - _dot(direction, reference)) < 1e-9 * abs(tangent)


@pytest.mark.parametrize(
    "adjoint",
    (diffrax.RecursiveCheckpointAdjoint(), diffrax.ForwardMode()),
    ids=lambda x: type(x).__name__,
)
def test_adaptive(adjoint):
    # Windows depend on the inputs, but the derivative of Diffrax does not know that: so
    # compare with finite differences of a solve that is accurate.
    controller = diffrax.PIDController(rtol=1e-8, atol=1e-10)
    inputs = _inputs()
    direction = _direction(inputs)
    args = (tsit5, controller)
    if isinstance(adjoint, diffrax.ForwardMode):
        tangent = _jvp(inputs, direction, *args, adjoint)
    else:
        tangent = _dot(direction, _grad(inputs, *args, adjoint))
    direct = diffrax.DirectAdjoint()
    expected = _finite_difference(inputs, direction, *args, direct)
    assert abs(tangent - expected) < 1e-6 * abs(expected)


def test_rejected_windows_do_not_leak():
    # The first windows are far too large: their values overflow. This must leave no
    # trace in the gradient, such as a zero times an infinity.
    @jax.jit
    @ft.partial(jax.value_and_grad, has_aux=True)
    def value_and_grad(a):
        sol = diffeqsolve(
            ODETerm(lambda t, y, a: -50 * (y**3 - a * jnp.cos(3 * t))),
            DeerSolver(diffrax.Tsit5(), 16),
            0,
            5,
            5,
            jnp.array(2.0),
            a,
            stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-10),
        )
        return sol.ys[0], sol.stats["num_rejected_steps"]

    (_, rejected), grad = value_and_grad(1.5)
    assert rejected > 0
    eps = 1e-4
    (x, _), _ = value_and_grad(1.5 + eps)
    (y, _), _ = value_and_grad(1.5 - eps)
    expected = (x - y) / (2 * eps)
    assert abs(grad - expected) < 1e-5 * abs(expected)


def test_backsolve():
    # Approximate by design, so the tolerance is that of a continuous adjoint.
    inputs = _inputs()
    diff = {k: inputs[k] for k in ("y0", "args", "term")}

    tight = diffrax.PIDController(rtol=1e-7, atol=1e-9)

    @eqx.filter_jit
    @eqx.filter_grad
    def grad(diff):
        return _loss({**inputs, **diff}, tsit5, tight, diffrax.BacksolveAdjoint())

    reference = _sequential_grad(inputs, diffrax.Tsit5(), 80)
    reference = {k: reference[k] for k in diff}
    assert max_error(grad(diff), reference) < 1e-5


def test_implicit_adjoint():
    # To a steady state of `y' = tanh(a y + b) - y`.
    def solve(args, solver, adjoint):
        term = ODETerm(lambda t, y, args: jnp.tanh(args[0] @ y + args[1]) - y)
        event = diffrax.Event(diffrax.steady_state_event(1e-9, 1e-9))
        return diffeqsolve(
            term,
            solver,
            0,
            jnp.inf,
            1.0,
            jnp.zeros(2),
            args,
            stepsize_controller=diffrax.PIDController(rtol=1e-7, atol=1e-9),
            event=event,
            adjoint=adjoint,
            max_steps=200,
        ).ys.sum()

    args = (jnp.array([[0.3, -0.2], [0.4, 0.1]]), jnp.array([0.5, -0.3]))
    grad = jax.jit(jax.grad(solve), static_argnums=(1, 2))
    adjoint = diffrax.ImplicitAdjoint()
    deer = grad(args, DeerSolver(diffrax.Tsit5(), 8), adjoint)
    ref = grad(args, diffrax.Tsit5(), adjoint)
    assert max_error(deer, ref) < 1e-6


def test_hessian():
    solver = DeerSolver(diffrax.Tsit5(), 8, scan=AssociativeScan())
    inputs = _inputs()

    def flat_loss(x, loss, *args):
        return loss({**inputs, "y0": x[:3], "args": x[3], "t1": x[4]}, *args)

    x = jnp.concatenate([inputs["y0"], inputs["args"][None], inputs["t1"][None]])
    saveat = SaveAt(t1=True)
    hessian = eqx.filter_jit(jax.hessian(flat_loss))
    deer = hessian(x, _loss, solver, constant, diffrax.DirectAdjoint(), saveat, 1)
    ref = hessian(x, _sequential_loss, diffrax.Tsit5(), 8, saveat, 1)
    assert max_error(deer, ref) < 1e-9
    assert max_error(deer, deer.T) < 1e-12


def test_step_aligned_saves():
    # Diffrax's default adjoint may drop the gradient of saves at the ends of steps. Not
    # of our making; but `DirectAdjoint` must get it right.
    def loss(y0, adjoint):
        sol = diffeqsolve(
            ODETerm(lambda t, y, args: 0 * y),
            DeerSolver(diffrax.Euler(), 2),
            0,
            10,
            0.2,
            y0,
            saveat=SaveAt(ts=jnp.linspace(0, 10, 101)),
            adjoint=adjoint,
            max_steps=64,
        )
        return jnp.sum(sol.ys)

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    for adjoint in (
        diffrax.DirectAdjoint(),
        diffrax.RecursiveCheckpointAdjoint(checkpoints=64),
    ):
        assert grad(1.0, adjoint) == 101


def test_closed_over_parameters():
    term, y0, args = problem()

    def loss(weight, solver):
        def vector_field(t, y, args):
            return jnp.tanh(weight @ y)

        sol = diffeqsolve(ODETerm(vector_field), solver, 0, 1, 0.5, y0)
        return jnp.sum(sol.ys)

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    weight = cast(Any, term.vector_field).weight
    deer = grad(weight, DeerSolver(diffrax.Heun(), 4))
    ts = np.linspace(0, 1, 9)

    @jax.jit
    @jax.grad
    def ref(weight):
        return sequential(
            ODETerm(lambda t, y, args: jnp.tanh(weight @ y)),
            diffrax.Heun(),
            ts,
            y0,
            adjoint=diffrax.DirectAdjoint(),
        ).ys.sum()

    assert max_error(deer, ref(weight)) < 1e-10


def test_pair_of_terms():
    terms, y0, args = split_problem()

    def loss(y0, args, solver, dt0):
        sol = diffeqsolve(terms, solver, 0, 1, dt0, y0, args)
        return sum(jnp.sum(jnp.sin(y)) for y in sol.ys)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=(2, 3))
    solver = diffrax.SemiImplicitEuler()
    deer = grad(y0, args, DeerSolver(solver, 5), 0.5)
    assert max_error(deer, grad(y0, args, solver, 0.1)) < 1e-10


def test_no_derivative_of_the_guess():
    term, y0, args = problem()
    solver = DeerSolver(diffrax.Tsit5(), 8)

    def solve(y0, state=None):
        saveat = SaveAt(solver_state=True, t1=True)
        return diffeqsolve(
            term, solver, 0, 1, 1, y0, args, saveat=saveat, solver_state=state
        )

    @jax.jit
    @ft.partial(jax.jacrev, has_aux=True)
    def cold(y0):
        sol = solve(y0)
        sums = dict(ys=sol.ys.sum(), state=sol.solver_state.ys.sum())
        return sums, sol.solver_state

    @jax.jit
    @ft.partial(jax.grad, argnums=(0, 1))
    def warm(y0, ys, state):
        return solve(y0, eqx.tree_at(lambda s: s.ys, state, ys)).ys.sum()

    expected, state = cold(y0)
    grad, guess_grad = warm(y0, state.ys, state)
    assert max_error(grad, expected["ys"]) < 1e-10
    assert jnp.all(guess_grad == 0)
    # Nor has the state a derivative.
    assert jnp.all(expected["state"] == 0)


@pytest.mark.parametrize("adjoint", (DeerAdjoint(), diffrax.DirectAdjoint()))
def test_large_states(adjoint):
    # Of these no Jacobian is formed, only products with them are.
    rng = np.random.default_rng(0)
    weight = jnp.array(rng.normal(size=(20, 20)) / 20**0.5)
    y0 = jnp.array(rng.normal(size=20))
    term = ODETerm(lambda t, y, weight: jnp.tanh(weight @ y + jnp.sin(t)))

    def loss(inputs, solver, adjoint, steps):
        t1, y0, weight = inputs
        saveat = SaveAt(ts=t1 * jnp.array([0.33, 1]))
        sol = diffeqsolve(
            *(term, solver, 0, t1, t1 / steps, y0, weight),
            saveat=saveat,
            adjoint=adjoint,
            max_steps=steps,
        )
        return weighted_sum(sol.ys)

    @ft.partial(jax.jit, static_argnames=("solver", "adjoint", "steps"))
    def value_and_grad(inputs, solver, adjoint, steps):
        return jax.value_and_grad(loss)(inputs, solver, adjoint, steps)

    inputs = (jnp.array(3.0), y0, weight)
    deer = DeerSolver(diffrax.Bosh3(), 12)
    actual = value_and_grad(inputs, deer, adjoint, 1)
    direct = diffrax.DirectAdjoint()
    expected = value_and_grad(inputs, diffrax.Bosh3(), direct, 12)
    assert max_error(actual, expected) < 1e-8
    forward = lambda y0: loss((inputs[0], y0, weight), deer, adjoint, 1)
    tangent = jax.jit(lambda y0: jax.jvp(forward, (y0,), (y0,))[1])(y0)
    assert abs(tangent - expected[1][1] @ y0) < 1e-8 * jnp.linalg.norm(expected[1][1])


@pytest.mark.parametrize(
    "solver,method,substeps",
    (
        (diffrax.Dopri8(), DEER(), 64),
        (diffrax.Tsit5(), QuasiDEER(), 64),
        (diffrax.HalfSolver(diffrax.Heun()), DEER(), 64),
        # From coarser grids.
        (diffrax.Tsit5(), DEER(), 2048),
    ),
    ids=("Dopri8", "QuasiDEER", "HalfSolver", "long"),
)
def test_as_on_a_gpu(solver, method, substeps, monkeypatch):
    # From a constant guess or coarser grids, and by recurrences, where a CPU makes one
    # step after the other.
    def value_and_grad():
        def loss(args):
            sol = diffeqsolve(
                *(ODETerm(van_der_pol), DeerSolver(solver, substeps, method=method)),
                *(0.0, 5.0, 5.0, jnp.array([2.0, 0.0]), args),
                saveat=SaveAt(ts=jnp.array([1.3, 5.0])),
                max_steps=1,
                adjoint=DeerAdjoint(),
            )
            return jnp.sum(jnp.sin(sol.ys)), sol.stats["sequential_evaluations"]

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(1.2)

    (value, span), grad = value_and_grad()
    # What has been traced before is not traced again.
    jax.clear_caches()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    (gpu_value, gpu_span), gpu_grad = value_and_grad()
    assert max_error((gpu_value, gpu_grad), (value, grad)) < 1e-8
    assert gpu_span < span
    jax.clear_caches()


@pytest.mark.parametrize("adjoint", (DeerAdjoint(), diffrax.DirectAdjoint()))
def test_vector_field_that_reads_nothing(adjoint):
    # Nothing then has a derivative with respect to the state.
    def loss(y0, rate, vector_field):
        sol = diffeqsolve(
            *(ODETerm(vector_field), DeerSolver(diffrax.Heun(), 4), 0, 1, 0.5, y0),
            rate,
            adjoint=adjoint,
        )
        return sol.ys[0]

    gradient = jax.grad(loss, (0, 1))
    assert gradient(1.0, 2.0, lambda t, y, rate: rate + 0 * t) == (1.0, 1.0)
    stopped = lambda t, y, rate: jax.lax.stop_gradient(rate * y)
    assert gradient(1.0, 2.0, stopped) == (1.0, 0.0)


@pytest.mark.parametrize("solver", (diffrax.Heun(), DeerSolver(diffrax.Heun(), 4)))
def test_no_step(solver):
    def value(t0, t1, y0):
        return diffeqsolve(
            *(ODETerm(lambda t, y, args: -y), solver, t0, t1, 0.1, y0),
            saveat=SaveAt(ts=jnp.array([1.0])),
            adjoint=DeerAdjoint(),
        ).ys[0]

    assert jax.grad(value, (0, 1, 2))(1.0, 1.0, 2.0) == (0.0, 0.0, 1.0)
