"""`DeerAdjoint`, against `DirectAdjoint`, formulas, or finite differences."""

import functools as ft
import os
import re
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest
from diffrax import ControlTerm, MultiTerm, ODETerm, RESULTS, SubSaveAt
from diffrax_deer import (
    AssociativeScan,
    ConstantGuess,
    DeerAdjoint,
    DeerSolver,
    DeerState,
    SequentialScan,
)
from jax.flatten_util import ravel_pytree

from .helpers import (
    diffeqsolve,
    exact,
    max_error,
    problem,
    root_finder,
    SaveAt,
    StepTo,
    weighted_sum,
)


direct = diffrax.DirectAdjoint()
checkpointed = diffrax.RecursiveCheckpointAdjoint()
newton = optx.Newton(1e-10, 1e-10)
constant = diffrax.ConstantStepSize()
adaptive = diffrax.PIDController(rtol=1e-2, atol=1e-4)
euler = diffrax.Euler()
heun = diffrax.Heun()
bosh3 = diffrax.Bosh3()
tsit5 = diffrax.Tsit5()
kvaerno3 = diffrax.Kvaerno3(root_finder=root_finder)


def _deer(solver, substeps=1):
    # The guess that is compiled most quickly.
    return DeerSolver(solver, substeps, guess=ConstantGuess())


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
        (_deer(tsit5), "constant", in_groups, tsit5),
        (_deer(tsit5), "step-to", DeerAdjoint(), tsit5),
        (_deer(tsit5, 3), "clip", DeerAdjoint(), _deer(tsit5, 3)),
        (_deer(kvaerno3), "constant", DeerAdjoint(), kvaerno3),
        (_deer(kvaerno3), "step-to", DeerAdjoint(), kvaerno3),
        (_deer(kvaerno3), "clip", DeerAdjoint(), kvaerno3),
    ),
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_matrix(solver, controller, adjoint, reference):
    _check(forwards, solver, controller, adjoint, reference)
    _check(backwards, solver, controller, adjoint, reference)
    if controller == "clip":
        _check(never_clipped, solver, controller, adjoint, reference)


@pytest.mark.parametrize("solver", (tsit5, _deer(tsit5)), ids=("tsit5", "deer"))
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


@pytest.mark.parametrize("solver", (euler, _deer(euler)), ids=("euler", "deer"))
@pytest.mark.parametrize("steps", (100, 1000))
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


def test_times_between_which_steps_are_exact():
    # So that the derivatives are known, no matter where an adaptive controller steps.
    def fn(t, tau, a):
        return a * (t**2 if t < tau else 4 * tau**2 - 3 * t**2)

    @jax.jit
    @jax.value_and_grad
    def loss(x):
        sol = diffeqsolve(
            ODETerm(lambda t, y, a: 2 * a * t * jnp.where(t < x["tau"], 1, -3)),
            _deer(heun, 4),
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


@pytest.mark.parametrize(
    "solver,adjoint",
    (
        (euler, DeerAdjoint()),
        (_deer(euler), DeerAdjoint()),
        (_deer(euler), DeerAdjoint(max_window_points=3)),
    ),
    ids=("euler", "merged", "groups"),
)
def test_max_steps_reached(solver, adjoint):
    term, y0, args = problem()

    def solve(solver, adjoint):
        return diffeqsolve(
            term,
            solver,
            0,
            2,
            0.1,
            y0,
            args,
            saveat=SaveAt(ts=jnp.linspace(0, 2, 9), steps=True, t0=True),
            adjoint=adjoint,
            max_steps=7,
            throw=False,
        )

    sol, ref = solve(solver, adjoint), solve(euler, checkpointed)
    assert sol.result == ref.result == RESULTS.max_steps_reached
    num_saved = int(jnp.sum(jnp.isfinite(ref.ts)))
    saved = lambda sol: (sol.ts[:num_saved], sol.ys[:num_saved])
    assert max_error(saved(sol), saved(ref)) < 1e-12
    for x in (sol.ts, sol.ys):
        assert jnp.all(jnp.isinf(x[num_saved:]))
    assert {k: sol.stats[k] for k in ref.stats} == ref.stats


@pytest.mark.parametrize(
    "solver,controller,adjoint,num_steps",
    (
        (heun, constant, DeerAdjoint(max_windows=25), 25),
        (
            _deer(heun, 2),
            constant,
            DeerAdjoint(max_windows=12, max_window_points=4),
            24,
        ),
        (_deer(heun, 2), adaptive, DeerAdjoint(max_windows=5), 5),
    ),
    ids=("plain", "merged", "adaptive"),
)
def test_max_windows_reached(solver, controller, adjoint, num_steps):
    term, y0, args = problem()
    ts = jnp.linspace(0, 2, 41)

    sol = diffeqsolve(
        term,
        solver,
        0,
        2,
        0.02,
        y0,
        args,
        saveat=SaveAt(ts=ts),
        stepsize_controller=controller,
        adjoint=adjoint,
        throw=False,
    )
    assert sol.result == RESULTS.max_steps_reached
    assert sol.stats["num_accepted_steps"] == num_steps
    num_saved = int(jnp.sum(jnp.isfinite(sol.ts)))
    assert 9 < num_saved < len(ts)
    expected = exact(term, 0, 2, y0, args, saveat=SaveAt(ts=ts)).ys
    assert max_error(sol.ts[:num_saved], ts[:num_saved]) == 0
    assert max_error(sol.ys[:num_saved], expected[:num_saved]) < 3e-3
    assert jnp.all(jnp.isinf(sol.ys[num_saved:]))


@pytest.mark.parametrize("solver", (euler, _deer(euler)), ids=("euler", "deer"))
@pytest.mark.parametrize(
    "max_windows,max_steps,match",
    (
        (2, 16, "larger.*max_windows"),
        # The user knows that limit, so the error is that of Diffrax.
        (None, 8, "increasing `max_steps`"),
    ),
    ids=("windows", "steps"),
)
def test_errors_at_runtime(solver, max_windows, max_steps, match):
    term, y0, args = problem()
    adjoint = DeerAdjoint(max_windows=max_windows, max_window_points=4)
    with pytest.raises(eqx.EquinoxRuntimeError, match=match):
        sol = diffeqsolve(
            term, solver, 0, 1, 0.1, y0, args, adjoint=adjoint, max_steps=max_steps
        )
        jax.block_until_ready(sol.ys)


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
        (_deer(heun), adaptive, DeerAdjoint(), heun),
        (_deer(heun), constant, in_groups, heun),
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
    "modes,solver",
    (
        ((jax.jacfwd, jax.jacrev), _deer(euler)),
        ((jax.jacrev, jax.jacrev), _deer(euler)),
        ((jax.jacfwd, jax.jacrev), euler),
    ),
    ids=("deer", "deer-reverse", "euler"),
)
def test_hessian(modes, solver, hessian):
    outer, inner = modes
    fn = eqx.filter_jit(outer(inner(_flat_loss)))
    actual = fn(flat_inputs, solver, constant, in_groups)
    assert max_error(actual, hessian) < 1e-9
    assert max_error(actual, actual.T) < 1e-12


def test_forward_mode():
    # As in `test_vmap`, so that the reference is compiled already.
    fn = lambda x: _flat_loss(x, _deer(heun), constant, in_groups)
    direction = jnp.array([0.3, -0.8, 0.5, 0.2, -0.4])
    _, tangent = jax.jit(lambda x, v: jax.jvp(fn, (x,), (v,)))(flat_inputs, direction)
    _, grad = _flat_value_and_grad(flat_inputs, heun, constant, direct)
    assert abs(tangent - jnp.vdot(grad, direction)) < 1e-9 * abs(tangent)


@pytest.mark.parametrize(
    "solver,dt0", ((bosh3, 0.1), (_deer(bosh3, 16), 2)), ids=("plain", "deer")
)
def test_rejected_windows_do_not_leak(solver, dt0):
    # The first steps are too large, and the values of the windows overflow. This must
    # leave no trace in the gradient, such as a zero times an infinity.
    @jax.jit
    @ft.partial(jax.value_and_grad, has_aux=True)
    def value_and_grad(a):
        sol = diffeqsolve(
            ODETerm(lambda t, y, a: -50 * (y**3 - a * jnp.cos(3 * t))),
            solver,
            0,
            2,
            dt0,
            jnp.array(2.0),
            a,
            saveat=SaveAt(ts=jnp.array([0.3, 2.0])),
            stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-10),
            adjoint=DeerAdjoint(),
        )
        return jnp.sum(sol.ys), sol.stats["num_rejected_steps"]

    (_, num_rejected_steps), grad = value_and_grad(1.5)
    assert num_rejected_steps > 0
    eps = 1e-3
    (x, _), _ = value_and_grad(1.5 + eps)
    (y, _), _ = value_and_grad(1.5 - eps)
    assert abs(grad - (x - y) / (2 * eps)) < 1e-4 * abs(grad)


def _oscillator(t, y, args):
    x, v = y
    return v, -args["a"] * x


def test_events_inside_windows():
    # At the ends of each of both windows, `x` is on the same side of all levels.
    directions = dict(any=None, down=False, up=True)
    level = lambda name: lambda t, y, args, **kwargs: y[0] - args[name]
    cond_fns: dict[str, Any] = {name: level(name) for name in directions}
    cond_fns["at_once"] = lambda t, y, args, **kwargs: args["at_once"] > 0
    event = diffrax.Event(cond_fns, newton, directions | dict(at_once=None))

    @jax.jit
    @jax.vmap
    def solve_and_jacobian(args):
        def solve(args):
            sol = diffeqsolve(
                ODETerm(_oscillator),
                _deer(bosh3, 200),
                0,
                6,
                3,
                (0.0, 1.0),
                args,
                saveat=SaveAt(t1=True),
                event=event,
                adjoint=DeerAdjoint(),
                max_steps=2,
            )
            out = jnp.concatenate([sol.ts, *sol.ys])
            return out, (out, sol.event_mask)

        jac, (out, mask) = jax.jacrev(solve, has_aux=True)(args)
        return out, jac, mask

    def formula(args, name):
        w = jnp.sqrt(args["a"])
        if name == "none":
            t = 6.0
        elif name == "at_once":
            t = 0.0
        else:
            angle = jnp.arcsin(args[name] * w)
            t = (angle if name == "up" else jnp.pi - angle) / w
        return jnp.stack([t, jnp.sin(w * t) / w, jnp.cos(w * t)])

    never = dict(any=9.0, down=9.0, up=9.0, at_once=-1.0)
    # That of any direction is in the second window.
    once = dict(any=-0.5, down=0.5, up=0.4, at_once=1.0, none=None)
    batch = []
    for name, value in once.items():
        args = dict(a=1.3) | never
        batch.append(args if value is None else args | {name: value})
    batch = jtu.tree_map(lambda *x: jnp.stack(x), *batch)
    outs, jacs, masks = solve_and_jacobian(batch)
    for i, name in enumerate(once):
        args, jac, mask = jtu.tree_map(lambda x: x[i], (batch, jacs, masks))
        assert mask == {k: k == name for k in never}
        assert max_error(outs[i], formula(args, name)) < 1e-6
        assert max_error(jac, jax.jacrev(formula)(args, name)) < 1e-5


@eqx.filter_jit
def _solve_with_events(args, t1, solver, controller, adjoint, root_finder):
    boolean = lambda t, y, args, **kwargs: y[0] > args["above"]
    floating = lambda t, y, args, **kwargs: y[1] - args["level"]
    subs = dict(
        ts=SubSaveAt(ts=jnp.linspace(0, 1.5, 16)),
        all=SubSaveAt(t0=True, ts=jnp.linspace(0, 1.5, 4), steps=2, t1=True),
    )
    sol = diffeqsolve(
        ODETerm(_oscillator),
        solver,
        0,
        t1,
        0.11,
        (0.3, 1.0),
        args,
        saveat=SaveAt(subs=subs),
        stepsize_controller=controller,
        event=diffrax.Event([boolean, floating], root_finder),
        adjoint=adjoint,
        max_steps=32,
    )
    # Memory that is not used, in a way that can be compared.
    mark = lambda x: jnp.where(jnp.isinf(x), -1.0, x)
    ts, ys = jtu.tree_map(mark, (sol.ts, sol.ys))
    occurred = sol.result == RESULTS.event_occurred
    num_steps = sol.stats["num_steps"]
    return {k: (ts[k], ys[k]) for k in subs}, num_steps, sol.event_mask, occurred


@pytest.mark.parametrize(
    "solver,controller,adjoint,root_finder",
    (
        (heun, adaptive, DeerAdjoint(), newton),
        (_deer(heun), constant, DeerAdjoint(), None),
        (_deer(heun), constant, in_groups, newton),
    ),
    ids=("plain", "deer", "merged"),
)
def test_events_are_those_of_diffrax(solver, controller, adjoint, root_finder):
    for above, level, t1, num_steps, mask in (
        (9.0, 0.3, 2.0, 8, [False, True]),
        (0.7, 0.3, 2.0, 5, [True, False]),
        # Of two in the same step, the first counts.
        (0.89, 0.3, 2.0, 8, [True, False]),
        (9.0, -9.0, 2.0, 19, [False, False]),
        (9.0, 0.3, jnp.inf, 8, [False, True]),
        (0.7, 0.3, jnp.inf, 5, [True, False]),
        # At the very beginning.
        (0.0, 0.3, 2.0, 0, [True, False]),
    ):
        args = dict(a=1.3, above=above, level=level)
        args, t1 = jtu.tree_map(jnp.array, (args, t1))
        saved, *out = _solve_with_events(
            args, t1, solver, controller, adjoint, root_finder
        )
        expected, *ref = _solve_with_events(
            args, t1, heun, controller, checkpointed, root_finder
        )
        assert out == ref
        if controller is constant:
            assert out == [num_steps, mask, any(mask)]
        if root_finder is not None and not out[1][1]:
            # Diffrax then saves the last step twice.
            del saved["all"], expected["all"]
        assert max_error(saved, expected) < 1e-9


@pytest.mark.filterwarnings("ignore:.*is not marked as converging")
@pytest.mark.parametrize(
    "solver,reference",
    ((_deer(euler), euler), (diffrax.EulerHeun(), diffrax.EulerHeun())),
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
    actual = value_and_grad(inputs, _deer(heun), DeerAdjoint())
    assert {x.dtype for x in jtu.tree_leaves(actual)} == {jnp.dtype(jnp.float32)}
    # The derivative with respect to `dt0` is nearly zero.
    assert max_error(ravel_pytree(actual)[0], ravel_pytree(expected)[0]) < 1e-5


@pytest.mark.parametrize("y0", (jnp.ones(0), None), ids=("array", "none"))
def test_empty_state(y0):
    sol = diffeqsolve(
        ODETerm(lambda t, y, args: y),
        _deer(heun),
        0,
        1,
        0.3,
        y0,
        saveat=SaveAt(ts=jnp.linspace(0, 1, 3), dense=True),
        adjoint=DeerAdjoint(),
        max_steps=8,
    )
    assert sol.stats["num_steps"] == 4
    assert eqx.tree_equal(sol.evaluate(0.5), y0)


@pytest.mark.parametrize(
    "kwargs,error",
    (
        (dict(max_windows=0), ValueError),
        (dict(max_windows=True), TypeError),
        (dict(max_window_points=-1), ValueError),
        (dict(max_window_points=2.5), TypeError),
    ),
    ids=str,
)
def test_bad_arguments(kwargs, error):
    (name,) = kwargs
    with pytest.raises(error, match=f"DeerAdjoint.{name}"):
        DeerAdjoint(**kwargs)


@pytest.mark.parametrize(
    "solver",
    (diffrax.LeapfrogMidpoint(), diffrax.HalfSolver(diffrax.ReversibleHeun())),
    ids=("LeapfrogMidpoint", "HalfSolver"),
)
def test_not_a_one_step_method(solver):
    term, y0, args = problem()
    with pytest.raises(ValueError, match="DeerAdjoint.*previous one"):
        diffeqsolve(term, solver, 0, 1, 0.1, y0, args, adjoint=DeerAdjoint())


@pytest.mark.parametrize("solver", (euler, _deer(euler)), ids=("euler", "deer"))
def test_unsafe_brownian_path(solver):
    term, y0, args = problem()
    path = diffrax.UnsafeBrownianPath((3,), key=jr.key(0))
    diffusion = ControlTerm(lambda t, y, args: jnp.diag(y), path)
    terms = MultiTerm(term, diffusion)
    with pytest.raises(ValueError, match="VirtualBrownianTree"):
        diffeqsolve(terms, solver, 0, 1, 0.1, y0, args, adjoint=DeerAdjoint())


def test_statistics():
    def van_der_pol(t, y, args):
        return jnp.stack([y[1], 5 * (1 - y[0] ** 2) * y[1] - y[0]])

    @jax.jit
    def solve(t0, t1, y0):
        sol = diffeqsolve(
            ODETerm(van_der_pol),
            _deer(heun, 64),
            t0,
            t1,
            2.0,
            y0,
            saveat=SaveAt(t1=True, solver_state=True),
            adjoint=DeerAdjoint(),
            max_steps=4,
        )
        stats = [sol.stats[k] for k in ("num_iterations", "max_window_iterations")]
        return sol.ys[0], stats, sol.solver_state.num_iterations

    y0 = jnp.array([2.0, 0.0])
    y, each = y0, []
    for i in range(4):
        y, stats, num_iterations = solve(2.0 * i, 2.0 * (i + 1), y)
        assert stats == [num_iterations] * 2
        each.append(num_iterations)
    _, stats, num_iterations = solve(0.0, 8.0, y0)
    assert stats == [sum(each), max(each)]
    assert num_iterations == each[-1] < max(each)


def test_no_iterations():
    term, y0, args = problem()
    sol = diffeqsolve(term, heun, 0, 1, 0.1, y0, args, adjoint=DeerAdjoint())
    assert sol.stats["num_iterations"] == sol.stats["max_window_iterations"] == 0


@pytest.mark.parametrize(
    "solver,controller",
    (
        (
            bosh3,
            diffrax.ClipStepSizeController(
                diffrax.PIDController(rtol=1e-6, atol=1e-8), jump_ts=jnp.array([1.0])
            ),
        ),
        (_deer(heun, 3), diffrax.PIDController(rtol=1e-3, atol=1e-5)),
        (_deer(heun, 3), constant),
    ),
    ids=("plain", "deer", "merged"),
)
def test_resume(solver, controller):
    term, y0, args = problem()

    def solve(t0, t1, y0, adjoint, **states):
        return diffeqsolve(
            term,
            solver,
            t0,
            t1,
            0.15,
            y0,
            args,
            saveat=SaveAt(
                t1=True, solver_state=True, controller_state=True, made_jump=True
            ),
            stepsize_controller=controller,
            adjoint=adjoint,
            **states,
        )

    def states(sol):
        names = ("solver_state", "controller_state", "made_jump")
        return {k: getattr(sol, k) for k in names}

    # Merges 4 steps, the last 3 of which make a window of their own.
    adjoint = DeerAdjoint(max_window_points=12)
    first, expected = solve(0, 1, y0, adjoint), solve(0, 1, y0, checkpointed)
    for x, y in (
        (first.ys, expected.ys),
        (first.controller_state, expected.controller_state),
        (_uncounted(first.solver_state), _uncounted(expected.solver_state)),
        (first.made_jump, expected.made_jump),
    ):
        assert max_error(x, y) < 1e-9
    # That of constant steps says how many remain until this `t1`.
    if controller is not constant:
        second = solve(1, 2, first.ys[0], adjoint, **states(first))
        expected = solve(1, 2, expected.ys[0], checkpointed, **states(expected))
        assert max_error(second.ys, expected.ys) < 1e-9
        assert second.stats["num_steps"] == expected.stats["num_steps"]


def _uncounted(state):
    # If windows are merged, then iterations are not those of a step.
    if isinstance(state, DeerState):
        return eqx.tree_at(
            lambda s: (s.num_iterations, s.sequential_evaluations), state, (0, 0)
        )
    else:
        return state


def test_warm_start():
    term, y0, args = problem()
    solver = _deer(heun, 64)

    @jax.jit
    def solve_and_jacobian(y0, guess, state):
        def solve(y0, guess):
            sol = diffeqsolve(
                term,
                solver,
                0,
                6,
                6,
                y0,
                args,
                saveat=SaveAt(t1=True, solver_state=True),
                adjoint=DeerAdjoint(),
                solver_state=eqx.tree_at(lambda s: s.ys, state, guess),
                max_steps=1,
            )
            sums = jnp.stack([jnp.sum(sol.ys), jnp.sum(sol.solver_state.ys)])
            return sums, (sol.solver_state, sol.stats["num_iterations"])

        return jax.jacrev(solve, argnums=(0, 1), has_aux=True)(y0, guess)

    state = solver.init(term, jnp.array(0.0), jnp.array(6.0), y0, args)
    (cold_jac, _), (state, cold) = solve_and_jacobian(y0, state.ys, state)
    (warm_jac, guess_jac), (_, warm) = solve_and_jacobian(y0, state.ys, state)
    assert warm < cold
    assert max_error(warm_jac, cold_jac) < 1e-9
    # Neither what is passed nor what is returned is more than a guess.
    assert jnp.all(guess_jac == 0)
    assert jnp.any(cold_jac[0] != 0) and jnp.all(cold_jac[1] == 0)


@pytest.mark.parametrize(
    "solver,controller",
    ((heun, adaptive), (_deer(heun), constant)),
    ids=("adaptive", "merged"),
)
def test_progress_meter(solver, controller, capfd):
    term, y0, args = problem()

    @jax.jit
    @jax.grad
    def grad(y0):
        sol = diffeqsolve(
            term,
            solver,
            0,
            1,
            0.1,
            y0,
            args,
            stepsize_controller=controller,
            adjoint=DeerAdjoint(max_window_points=4),
            progress_meter=diffrax.TextProgressMeter(0.3),
        )
        return jnp.sum(sol.ys)

    jax.block_until_ready(grad(y0))
    jax.effects_barrier()
    lines = capfd.readouterr().out.split()
    assert lines[0] == "0.00%" and lines[-1] == "100.00%"
    # Several windows.
    assert len(lines) > 3
