"""`DeerAdjoint`, against `DirectAdjoint`, formulas, or finite differences."""

import functools as ft
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from diffrax import ControlTerm, MultiTerm, ODETerm, SubSaveAt
from diffrax_deer import DeerAdjoint
from diffrax_deer._implicit import share_read
from jax.flatten_util import ravel_pytree

from .helpers import (
    deer,
    diffeqsolve,
    discretised,
    max_error,
    problem,
    root_finder,
    SaveAt,
    solver_id,
    StepTo,
    weighted_sum,
)


direct = diffrax.DirectAdjoint()
constant = diffrax.ConstantStepSize()
euler = diffrax.Euler()
heun = diffrax.Heun()
tsit5 = diffrax.Tsit5()
kvaerno3 = diffrax.Kvaerno3(root_finder=root_finder)


# One problem, one function of all that may be differentiated, and everything that can
# be saved at once, so that as much as possible is compiled only once.


def _inputs(**kwargs) -> dict[str, Any]:
    term, y0, args = problem()
    arrays = dict(
        t0=0.1,
        t1=1.3,
        dt0=0.13,
        # For `StepTo`, and for `ClipStepSizeController` a step and a jump.
        steps=[0.4, 0.9],
        # None at the end of a step, where the derivative of an interpolation jumps.
        ts=[0.15, 0.33, 0.62, 1.21],
    )
    inputs = dict(term=term, y0=y0, args=args)
    return inputs | {k: jnp.array(v) for k, v in (arrays | kwargs).items()}


def _loss(inputs, solver, controller, adjoint):
    dt0, steps, ts = inputs["dt0"], inputs["steps"], inputs["ts"]
    chooses_steps = controller == "clip"
    if controller == "step-to":
        dt0 = None
        ends = [inputs["t0"][None], steps, inputs["t1"][None]]
        controller = StepTo(ts=jnp.concatenate(ends))
    elif controller == "constant":
        controller = constant
    else:
        # Also true if `DeerSolver` wraps it.
        rtol = 1e-3 if isinstance(solver, diffrax.Kvaerno3) else 1e-7
        controller = diffrax.ClipStepSizeController(
            diffrax.PIDController(rtol=rtol, atol=1e-2 * rtol),
            step_ts=steps[:1],
            jump_ts=steps[1:],
        )
    sub = SubSaveAt(
        t0=True,
        ts=ts,
        steps=2,
        t1=True,
        fn=lambda t, y, args: dict(a=t * y[0], b=args * y),
    )
    saveat = SaveAt(subs=[sub], dense=True, controller_state=True, made_jump=True)
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
    middle = inputs["t0"] + 0.45 * (inputs["t1"] - inputs["t0"])
    dense = (sol.evaluate(middle), sol.derivative(middle), sol.evaluate(inputs["t1"]))
    stats = {k: v for k, v in sol.stats.items() if k.endswith("_steps")}
    out = (sol.ts, sol.ys, dense, stats, sol.made_jump)
    if not chooses_steps:
        # Otherwise this depends on the error estimates, down to rounding errors.
        out = (*out, sol.controller_state)
    # Memory that is not used, in a way that can be compared.
    out = jtu.tree_map(lambda x: jnp.where(jnp.isinf(x), -1.0, x), out)
    # Where an adaptive controller has made its steps is not differentiable.
    ends = jnp.stack([inputs["t0"], inputs["t1"]])
    counts = jnp.isin(sol.ts[0], jnp.concatenate([ts, ends])) | (not chooses_steps)
    counts = counts & jnp.isfinite(sol.ts[0])
    saved = jax.vmap(lambda x: ravel_pytree(x)[0])((sol.ts, sol.ys))
    saved = jnp.where(counts[:, None], saved, 0)
    loss = sum(map(weighted_sum, (saved, *dense)))
    return loss, out


_value_and_grad = eqx.filter_jit(eqx.filter_value_and_grad(_loss, has_aux=True))


def _directions(inputs):
    """For every input a direction to move it in, with all the others fixed."""
    rng = np.random.default_rng(0)
    names = sorted(inputs)

    def directions(name):
        def leaf(x):
            out = np.zeros((len(names), *x.shape))
            out[names.index(name)] = rng.normal(size=x.shape)
            return jnp.asarray(out)

        return jtu.tree_map(leaf, eqx.filter(inputs[name], eqx.is_array))

    return {name: directions(name) for name in names}


@eqx.filter_jit
def _value_and_jvps(inputs, directions, *args):
    params, static = eqx.partition(inputs, eqx.is_array)
    fn = lambda params: _loss(eqx.combine(params, static), *args)
    jvp = lambda direction: jax.jvp(fn, (params,), (direction,), has_aux=True)
    value, tangents, aux = jax.vmap(jvp, out_axes=(None, 0, None))(directions)
    return (value, aux), dict(zip(sorted(inputs), tangents))


def _check(inputs, solver, controller, adjoint, reference):
    """Compares values and derivatives with those of `DirectAdjoint`."""
    (loss, out), grad = _value_and_grad(inputs, solver, controller, adjoint)
    directions = _directions(inputs)
    (expected_loss, expected_out), tangents = _value_and_jvps(
        inputs, directions, reference, controller, direct
    )
    # An adaptive controller divides error estimates, and so amplifies rounding errors.
    tol = 1e-7 if controller == "clip" else 1e-9
    assert max_error(out, expected_out) < tol
    assert max_error(loss, expected_loss) < tol
    largest = max(map(abs, tangents.values()))
    for index, name in enumerate(sorted(inputs)):
        products = jtu.tree_map(
            lambda x, y: jnp.vdot(x, y[index]), grad[name], directions[name]
        )
        error = abs(sum(jtu.tree_leaves(products)) - tangents[name])
        if controller == "clip" and name in ("t0", "dt0", "steps"):
            # The steps chosen stay where they are, but Diffrax moves them with these.
            # The difference is a truncation error.
            is_coarse = isinstance(solver, diffrax.Kvaerno3)
            assert error < (1e-2 if is_coarse else 1e-5) * largest, name
        else:
            assert error < tol * largest, name


forwards = _inputs()
backwards = _inputs(
    t0=1.3, t1=0.1, dt0=-0.13, steps=[0.9, 0.4], ts=[1.21, 0.62, 0.33, 0.15]
)
# Then `ClipStepSizeController` is the `PIDController` that it wraps.
never_clipped = _inputs(steps=[2.0, 3.0])


# Steps known in advance, with `DeerSolver(substeps=1)`, are merged into windows. Then
# the reference may as well be the wrapped solver, which is compiled more quickly.
in_groups = DeerAdjoint(max_window_points=4)


@pytest.mark.parametrize(
    "solver,controller,adjoint,reference",
    (
        (tsit5, "constant", DeerAdjoint(), tsit5),
        (tsit5, "step-to", DeerAdjoint(), tsit5),
        (tsit5, "clip", DeerAdjoint(), tsit5),
        # 10 steps, so the last window has 2 of them.
        (deer(tsit5), "constant", in_groups, tsit5),
        (deer(tsit5), "step-to", DeerAdjoint(), tsit5),
        (deer(tsit5, 3), "clip", DeerAdjoint(), deer(tsit5, 3)),
        (deer(kvaerno3), "constant", DeerAdjoint(), kvaerno3),
        (deer(kvaerno3), "clip", DeerAdjoint(), kvaerno3),
    ),
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_matrix(solver, controller, adjoint, reference):
    _check(forwards, solver, controller, adjoint, reference)
    _check(backwards, solver, controller, adjoint, reference)
    if controller == "clip":
        _check(never_clipped, solver, controller, adjoint, reference)


@pytest.mark.parametrize("solver", (tsit5, deer(tsit5)), ids=("tsit5", "deer"))
def test_one_step(solver):
    # It ends at `min(t0 + dt0, t1)`. If they are equal then Diffrax gives one half of
    # the derivative to each of them.
    inputs = _inputs(t0=0.0, t1=0.25, dt0=0.25, ts=[0.05, 0.1, 0.15, 0.2])
    adjoint = DeerAdjoint() if solver is tsit5 else in_groups

    def value_and_grad(t1):
        x = inputs | dict(t1=jnp.array(t1))
        (value, _), grad = _value_and_grad(x, solver, "constant", adjoint)
        return value, grad["t1"]

    # One-sided, as with a larger `t1` there is a second step.
    eps = 1e-4
    (x, grad), (y, _), (z, _) = (value_and_grad(0.25 - i * eps) for i in range(3))
    assert abs(grad - (3 * x - 4 * y + z) / (2 * eps)) < 1e-4 * abs(grad)


@pytest.mark.parametrize("solver", (deer(heun, 4), tsit5), ids=solver_id)
def test_times_between_which_steps_are_exact(solver):
    # So that the derivatives are known, no matter where an adaptive controller steps.
    def fn(t, tau, a):
        return a * (t**2 if t < tau else 4 * tau**2 - 3 * t**2)

    @jax.jit
    @jax.value_and_grad
    def loss(x):
        sol = diffeqsolve(
            ODETerm(lambda t, y, a: 2 * a * t * jnp.where(t < x["tau"], 1, -3)),
            solver,
            x["t0"],
            x["t1"],
            0.1,
            0.0,
            x["a"],
            saveat=SaveAt(ts=x["t"][None], t1=True),
            stepsize_controller=diffrax.ClipStepSizeController(
                diffrax.PIDController(rtol=1e-3, atol=1e-3),
                jump_ts=x["tau"][None],
            ),
            adjoint=DeerAdjoint(),
            max_steps=32,
        )
        return sol.ys[0] * sol.ys[1]

    x = dict(t0=0.3, t1=2.0, tau=1.1, t=0.7, a=0.8)

    @jax.value_and_grad
    def expected(x):
        start = fn(x["t0"], x["tau"], x["a"])
        ends = [fn(x[k], x["tau"], x["a"]) for k in ("t", "t1")]
        return (ends[0] - start) * (ends[1] - start)

    assert max_error(loss(jtu.tree_map(jnp.array, x)), expected(x)) < 1e-12


@pytest.mark.filterwarnings("ignore:.*is not marked as converging")
@pytest.mark.parametrize(
    "solver,reference",
    ((deer(euler), euler), (diffrax.EulerHeun(), diffrax.EulerHeun())),
    ids=("deer-euler", "euler-heun"),
)
def test_stochastic(solver, reference):
    path = diffrax.VirtualBrownianTree(0, 1, tol=1e-2, shape=(), key=jr.key(0))
    drift = ODETerm(lambda t, y, args: -args * jnp.sin(y))
    diffusion = ControlTerm(lambda t, y, args: args * jnp.cos(y), path)

    @eqx.filter_jit
    @jax.value_and_grad
    def value_and_grad(inputs, solver, adjoint):
        y0, args = inputs
        sol = diffeqsolve(
            MultiTerm(drift, diffusion),
            solver,
            0,
            1,
            0.11,
            y0,
            args,
            saveat=SaveAt(ts=jnp.array([0.2, 0.71]), t1=True),
            adjoint=adjoint,
            max_steps=16,
        )
        return weighted_sum(sol.ys)

    inputs = (jnp.array([1.0, -0.4]), 0.7)
    actual = value_and_grad(inputs, solver, DeerAdjoint())
    assert max_error(actual, value_and_grad(inputs, reference, direct)) < 1e-9


def _interpolated(t, y, table):
    def look_up(x):
        index = jnp.clip(x.astype(jnp.int32), 0, len(table) - 2)
        weight = x - index
        return (1 - weight) * table[index] + weight * table[index + 1]

    force = look_up(4000 * t) - y[0] - y[1] ** 3
    return jnp.stack([y[1] * look_up(900 * (1 + y[0])), force])


def test_which_vector_fields_look_things_up():
    def is_table(vector_field, args):
        y0, ts = jnp.array([1.0, 0.5]), jnp.array([0.0, 0.1])
        window = discretised(tsit5, ODETerm(vector_field), args, ts, y0).window
        return share_read(window, window) < 1

    def by_network(t, y, net):
        return net(y)

    ts = jnp.linspace(0, 1, 5000)
    spline = diffrax.LinearInterpolation(ts, jnp.sin(ts))
    net = eqx.nn.MLP(2, 2, 64, 2, key=jr.key(0))
    assert is_table(_interpolated, jnp.sin(ts))
    assert is_table(lambda t, y, args: y * args.evaluate(t), spline)
    assert not is_table(by_network, net)
    assert not is_table(lambda t, y, args: y * jnp.sum(args), ts)
    # It is short.
    assert not is_table(_interpolated, jnp.sin(ts[::20]))


@pytest.mark.parametrize("solver", (tsit5, deer(tsit5)), ids=("tsit5", "deer"))
@pytest.mark.parametrize("is_adaptive", (False, True), ids=("constant", "adaptive"))
def test_tables(solver, is_adaptive):
    table = 1 + jnp.sin(jnp.linspace(0, 9, 5000))
    inputs = jnp.array([1.0, 0.5]), table

    def loss(inputs, adjoint):
        controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
        sol = diffeqsolve(
            ODETerm(_interpolated),
            solver,
            0,
            1,
            0.03,
            *inputs,
            saveat=SaveAt(ts=jnp.array([0.2, 0.71]), t1=True),
            stepsize_controller=controller if is_adaptive else constant,
            adjoint=adjoint,
            max_steps=64,
        )
        return weighted_sum(sol.ys)

    @eqx.filter_jit
    def derivatives(adjoint):
        value_and_grad = jax.value_and_grad(ft.partial(loss, adjoint=adjoint))
        # Also of the gradient.
        return jax.jvp(value_and_grad, (inputs,), (inputs,))

    expected = derivatives(direct)
    assert max_error(derivatives(DeerAdjoint()), expected) < 1e-9


def test_table_read_within_another_solver():
    # Not a `DeerSolver` itself.
    solver = diffrax.HalfSolver(deer(tsit5, 2))

    def loss(table, adjoint):
        term, y0 = ODETerm(_interpolated), jnp.array([1.0, 0.5])
        sol = diffeqsolve(term, solver, 0, 1, 0.25, y0, table, adjoint=adjoint)
        return weighted_sum(sol.ys)

    grad = eqx.filter_jit(jax.grad(loss))
    table = 1 + jnp.sin(jnp.linspace(0, 9, 5000))
    expected = grad(table, diffrax.RecursiveCheckpointAdjoint())
    assert max_error(grad(table, DeerAdjoint()), expected) < 1e-9


def test_single_precision_and_pytrees():
    def vector_field(t, y, args):
        # Not defined at zero, which is what memory that is not used may contain.
        return dict(a=-args * y["a"] * y["b"], b=jnp.sum(y["a"]) + t / jnp.sqrt(y["b"]))

    @eqx.filter_jit
    @jax.value_and_grad
    def value_and_grad(inputs, solver, adjoint):
        y0, args, t0, t1, dt0, ts = inputs
        sol = diffeqsolve(
            ODETerm(vector_field),
            solver,
            t0,
            t1,
            dt0,
            y0,
            args,
            saveat=SaveAt(ts=ts, t1=True),
            adjoint=adjoint,
            max_steps=16,
        )
        return weighted_sum(sol.ys["a"]) + weighted_sum(sol.ys["b"])

    y0 = dict(a=jnp.array([0.3, -0.8]), b=jnp.array(0.7))
    inputs = (y0, 0.6, 0.1, 1.0, 0.13, jnp.array([0.2, 0.71]))
    expected = value_and_grad(inputs, heun, direct)
    inputs = jtu.tree_map(lambda x: jnp.asarray(x, jnp.float32), inputs)
    actual = value_and_grad(inputs, deer(heun), DeerAdjoint())
    assert {x.dtype for x in jtu.tree_leaves(actual)} == {jnp.dtype(jnp.float32)}
    # The derivative with respect to `dt0` is nearly zero.
    assert max_error(ravel_pytree(actual)[0], ravel_pytree(expected)[0]) < 1e-5
