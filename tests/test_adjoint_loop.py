"""How the loop of `DeerAdjoint` ends, what it counts, and what it refuses."""

import functools as ft

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from diffrax import ControlTerm, MultiTerm, ODETerm, RESULTS
from diffrax_deer import DeerAdjoint

from .helpers import deer, diffeqsolve, exact, max_error, problem, SaveAt, van_der_pol


checkpointed = diffrax.RecursiveCheckpointAdjoint()
constant = diffrax.ConstantStepSize()
adaptive = diffrax.PIDController(rtol=1e-2, atol=1e-4)
euler = diffrax.Euler()
heun = diffrax.Heun()
bosh3 = diffrax.Bosh3()


@pytest.mark.parametrize(
    "solver,adjoint",
    (
        (euler, DeerAdjoint()),
        (deer(euler), DeerAdjoint()),
        (deer(euler), DeerAdjoint(max_window_points=3)),
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


@pytest.mark.parametrize("solver", (heun, deer(heun)), ids=("heun", "windows"))
def test_no_tiny_step_at_the_end(solver):
    # Added up, ten steps end just before it.
    assert 1 - 1e-15 < sum([0.1] * 10) < 1
    term, y0, args = problem()
    controller = diffrax.PIDController(rtol=1, atol=1, dtmax=0.1)

    def solve(solver, adjoint):
        return diffeqsolve(
            *(term, solver, 0, 1, 0.1, y0, args),
            stepsize_controller=controller,
            adjoint=adjoint,
        )

    sol, ref = solve(solver, DeerAdjoint()), solve(heun, checkpointed)
    assert sol.stats["num_steps"] == ref.stats["num_steps"] == 10
    assert max_error(sol.ys, ref.ys) < 1e-12


@pytest.mark.parametrize(
    "solver,controller,adjoint,num_steps",
    (
        (heun, constant, DeerAdjoint(max_windows=25), 25),
        (
            deer(heun, 2),
            constant,
            DeerAdjoint(max_windows=12, max_window_points=4),
            24,
        ),
        (deer(heun, 2), adaptive, DeerAdjoint(max_windows=5), 5),
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


@pytest.mark.parametrize("solver", (euler, deer(euler)), ids=("euler", "deer"))
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


@pytest.mark.parametrize(
    "solver,dt0", ((bosh3, 0.1), (deer(bosh3, 16), 2)), ids=("plain", "deer")
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


@pytest.mark.parametrize("y0", (jnp.ones(0), None), ids=("array", "none"))
def test_empty_state(y0):
    sol = diffeqsolve(
        ODETerm(lambda t, y, args: y),
        deer(heun),
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


@pytest.mark.parametrize("solver", (euler, deer(euler)), ids=("euler", "deer"))
def test_unsafe_brownian_path(solver):
    term, y0, args = problem()
    path = diffrax.UnsafeBrownianPath((3,), key=jr.key(0))
    diffusion = ControlTerm(lambda t, y, args: jnp.diag(y), path)
    terms = MultiTerm(term, diffusion)
    with pytest.raises(ValueError, match="VirtualBrownianTree"):
        diffeqsolve(terms, solver, 0, 1, 0.1, y0, args, adjoint=DeerAdjoint())


def test_statistics():
    @jax.jit
    def solve(t0, t1, y0):
        sol = diffeqsolve(
            ODETerm(lambda t, y, args: van_der_pol(t, y, 5.0)),
            deer(heun, 64),
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
    ((heun, adaptive), (deer(heun), constant)),
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


def test_the_last_step_ends_where_that_of_diffrax_does():
    # Where the next to last one ends but so many floating point numbers before. (With
    # 99, Diffrax also makes a step of length zero.)
    def ends(adjoint, numbers):
        ts = jnp.array([0, 0.5, 1 - numbers * 2.0**-53, 1])
        sol = diffrax.diffeqsolve(
            ODETerm(lambda t, y, args: -y),
            *(diffrax.Euler(), 0.0, 1.0, None, 1.0),
            stepsize_controller=diffrax.StepTo(ts),
            saveat=SaveAt(steps=True),
            max_steps=4,
            adjoint=adjoint,
        )
        assert sol.ts is not None
        return set(sol.ts.tolist())

    for numbers in (99, 101):
        expected = ends(diffrax.RecursiveCheckpointAdjoint(), numbers)
        assert ends(DeerAdjoint(), numbers) == expected
