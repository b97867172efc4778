import functools as ft
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from diffrax import ODETerm, RESULTS
from diffrax_deer import (
    AdaptiveGrid,
    ConstantGuess,
    DeerAdjoint,
    DeerSolver,
    diagnose,
    ExtrapolationGuess,
    GaussLegendre,
    RadauIIA,
    UniformGrid,
)
from diffrax_deer._grid.density import Shares, spread

from .helpers import diffeqsolve, max_error, root_finder, SaveAt, van_der_pol


T = 20.0
Y0 = jnp.array([2.0, 0.0])


def _solver(wrapped, substeps, grid, guess):
    """With the default guess, that is, sequentially on a CPU, or another one."""
    kwargs = {} if guess is None else dict(guess=guess)
    return DeerSolver(wrapped, substeps, grid=grid, **kwargs)


@eqx.filter_jit
def _solve(solver, mu=5.0, adjoint=None, dense=False, throw=True) -> Any:
    return diffeqsolve(
        *(ODETerm(van_der_pol), solver, 0.0, T, T, Y0, mu),
        saveat=SaveAt(t1=True, solver_state=True, dense=dense),
        adjoint=diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
        max_steps=1,
        throw=throw,
    )


@pytest.fixture(scope="module")
def true():
    return diffeqsolve(
        *(ODETerm(van_der_pol), diffrax.Dopri8(), 0.0, T, 1e-3, Y0, 5.0),
        saveat=SaveAt(ts=jnp.linspace(0, T, 101)),
        stepsize_controller=diffrax.PIDController(rtol=1e-12, atol=1e-12),
        max_steps=10**5,
    ).ys


@pytest.mark.parametrize(
    "wrapped, substeps, guess",
    ((diffrax.Tsit5(), 256, None), (GaussLegendre(4), 128, ConstantGuess())),
)
def test_accuracy(wrapped, substeps, guess, true):
    grids = UniformGrid(), AdaptiveGrid()
    uniform, adaptive = (
        _solve(_solver(wrapped, substeps, grid, guess)) for grid in grids
    )
    error = max_error(adaptive.ys[-1], true[-1])
    assert max_error(uniform.ys[-1], true[-1]) > 50 * error
    assert error < 1e-6
    state = adaptive.solver_state
    lengths = jnp.diff(state.fractions)
    assert state.fractions.shape == (substeps + 1,)
    assert state.fractions[0] == 0 and state.fractions[-1] == 1
    assert jnp.all(lengths > 0)
    ratios = lengths[1:] / lengths[:-1]
    assert 1.2 < jnp.max(jnp.maximum(ratios, 1 / ratios)) < 2.5
    # All but the first solve are warm.
    if guess is not None:
        first = uniform.solver_state.num_iterations
        assert first < state.num_iterations <= first + 8


@pytest.mark.parametrize(
    "adjoint, guess",
    (
        (diffrax.RecursiveCheckpointAdjoint(), ConstantGuess()),
        (DeerAdjoint(), None),
    ),
)
def test_as_sequential_on_the_same_grid(adjoint, guess):
    solver = _solver(diffrax.Tsit5(), 256, AdaptiveGrid(), guess)

    def loss(solver, dt0, adjoint, controller, y0, mu, t1):
        # Not where steps end, as is the case at the end.
        ts = jnp.linspace(0, 0.99, 11) * t1
        subs = [diffrax.SubSaveAt(ts=ts), diffrax.SubSaveAt(t1=True)]
        sol = diffeqsolve(
            *(ODETerm(van_der_pol), solver, 0.0, t1, dt0, y0, mu),
            saveat=SaveAt(subs=subs),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=1 if dt0 is not None else 256,
        )
        return sum(jnp.sum(y**2) for y in sol.ys)

    @jax.jit
    @jax.value_and_grad
    def deer(inputs):
        constant = diffrax.ConstantStepSize()
        return loss(solver, inputs[2], adjoint, constant, *inputs)

    @jax.jit
    @jax.value_and_grad
    def sequential(inputs):
        steps = diffrax.StepTo(ts=fractions * inputs[2])
        direct = diffrax.DirectAdjoint()
        return loss(diffrax.Tsit5(), None, direct, steps, *inputs)

    inputs = (Y0, jnp.array(5.0), jnp.array(T))
    fractions = _solve(solver).solver_state.fractions
    value, gradient = deer(inputs)
    true_value, true_gradient = sequential(inputs)
    assert max_error(value, true_value) < 1e-8 * abs(true_value)
    size = max(float(jnp.max(jnp.abs(x))) for x in true_gradient)
    assert max_error(gradient, true_gradient) < 1e-8 * size


def test_dense_output(true):
    ts = jnp.linspace(0, T, 101)
    solver = DeerSolver(GaussLegendre(4), 128, grid=AdaptiveGrid())
    sols = [_solve(solver, 5.0, adjoint, True) for adjoint in (None, DeerAdjoint())]
    for sol in sols:
        ys = jax.vmap(sol.evaluate)(ts)
        assert max_error(ys, true) < 1e-5
        fractions = sol.solver_state.fractions
        # From both sides of where substeps meet.
        for left in (True, False):
            inner = jax.vmap(ft.partial(sol.evaluate, left=left))(T * fractions[1:-1])
            assert max_error(inner, sol.solver_state.ys[:-1]) < 1e-8


def test_dense_output_takes_no_memory_for_the_grid():
    saves, substeps = 2000, 512
    solver = DeerSolver(diffrax.Tsit5(), substeps, grid=AdaptiveGrid())
    sol = _solve(solver, 5.0, None, True)
    ts = jnp.linspace(0, T, saves)
    evaluate = jax.jit(lambda sol, ts: jax.vmap(sol.evaluate)(ts))
    memory: Any = evaluate.lower(sol, ts).compile().memory_analysis()
    assert memory.temp_size_in_bytes < saves * substeps * 8 / 4


@pytest.mark.parametrize("wrapped", (diffrax.Tsit5(), GaussLegendre(4)))
def test_tolerance(wrapped, true):
    def solve(tol):
        # Not by its value, so that there is a single compilation.
        tol = jnp.array(tol)
        grid = AdaptiveGrid(rtol=tol, atol=tol)
        return _solve(_solver(wrapped, 256, grid, ConstantGuess()), throw=False)

    failed = solve(1e-11)
    assert failed.result == RESULTS.dt_min_reached
    assert failed.solver_state.required_substeps > 256
    solved = solve(1e-4)
    assert solved.result == RESULTS.successful
    assert solved.solver_state.required_substeps <= 256
    assert max_error(solved.ys[-1], true[-1]) < 1e-3


def test_required_substeps():
    def solve(substeps, throw=False):
        grid = AdaptiveGrid(rtol=1e-7, atol=1e-7)
        return _solve(_solver(GaussLegendre(4), substeps, grid, None), throw=throw)

    with pytest.raises(Exception, match="minimum step size"):
        solve(64, throw=True)
    required = int(solve(64).solver_state.required_substeps)
    assert 64 < required < 512
    assert solve(required + required // 4).result == RESULTS.successful


@pytest.mark.parametrize("substeps", (120, 140, 160))
def test_tolerance_between_the_points(substeps):
    # What is interpolated is less accurate than what is not.
    ts, tol = jnp.linspace(0, T, 401), 1e-9
    grid = AdaptiveGrid(rtol=tol, atol=tol)
    sol = diffeqsolve(
        ODETerm(lambda t, y, args: jnp.stack([y[1], -y[0]])),
        _solver(GaussLegendre(4), substeps, grid, ConstantGuess()),
        *(0.0, T, T, jnp.array([1.0, 0.0])),
        saveat=SaveAt(ts=ts),
        max_steps=1,
        throw=False,
    )
    is_accurate = max_error(sol.ys[:, 0], jnp.cos(ts)) < 2 * tol
    assert is_accurate or sol.result == RESULTS.dt_min_reached


@pytest.mark.parametrize("wrapped", (diffrax.Euler(), diffrax.ItoMilstein()))
def test_random(wrapped):
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-5, (), jax.random.key(0))
    drift = ODETerm(lambda t, y, args: -y)
    terms = diffrax.MultiTerm(
        drift, diffrax.ControlTerm(lambda t, y, args: 0.5 * y, path)
    )
    grid = AdaptiveGrid(rtol=1e-4, atol=1e-4)
    sol = diffeqsolve(
        *(terms, _solver(wrapped, 64, grid, None), 0.0, 1.0, 1.0, jnp.array(1.0)),
        saveat=SaveAt(t1=True, solver_state=True),
        max_steps=1,
        throw=False,
    )
    assert sol.result == RESULTS.dt_min_reached
    assert sol.solver_state.required_substeps > 64


def test_nothing_to_move():
    def solve(grid):
        return diffeqsolve(
            ODETerm(lambda t, y, args: jnp.stack([y[1], -y[0]])),
            DeerSolver(diffrax.Tsit5(), 32, grid=grid, guess=ConstantGuess()),
            *(0.0, 10.0, 10.0, jnp.array([1.0, 0.0])),
            saveat=SaveAt(t1=True, solver_state=True),
            max_steps=1,
        )

    uniform, adaptive = solve(UniformGrid()), solve(AdaptiveGrid())
    states = uniform.solver_state, adaptive.solver_state
    assert states[0].num_iterations == states[1].num_iterations
    assert max_error(uniform.ys, adaptive.ys) < 1e-12
    assert max_error(states[1].fractions, jnp.linspace(0, 1, 33)) < 1e-12


def test_already_accurate():
    def fractions(tol):
        tol = jnp.array(tol)
        grid = AdaptiveGrid(rtol=tol, atol=tol)
        solver = _solver(diffrax.Tsit5(), 512, grid, None)
        return _solve(solver, 2.0, throw=False).solver_state.fractions

    uniform = jnp.linspace(0, 1, 513)
    assert max_error(fractions(1e-2), uniform) < 1e-12
    assert max_error(fractions(1e-8), uniform) > 1e-2


@pytest.mark.parametrize(
    "wrapped, dtype",
    (
        # Without an error estimate, with one, no Runge--Kutta method, and implicit.
        (diffrax.Euler(), jnp.float64),
        (diffrax.Heun(), jnp.float32),
        (diffrax.HalfSolver(diffrax.Euler()), jnp.float64),
        (diffrax.Kvaerno3(root_finder=root_finder), jnp.float64),
    ),
)
def test_pulse(wrapped, dtype):
    def pulse(t, y, args):
        return -y + 5 * jnp.exp(-(((t - 6) / 0.1) ** 2))

    def solve(solver, dt0, **kwargs):
        end, y0 = jnp.asarray(12.0, dtype), jnp.ones(1, dtype)
        return diffeqsolve(
            *(ODETerm(pulse), solver, 0 * end, end, dt0, y0),
            saveat=SaveAt(ts=jnp.linspace(0, end, 241)),
            **kwargs,
        ).ys

    controller = diffrax.PIDController(rtol=1e-5, atol=1e-5, dtmax=0.05)
    true = solve(diffrax.Dopri8(), 0.01, stepsize_controller=controller)
    uniform, adaptive = (
        max_error(solve(_solver(wrapped, 128, grid, None), 12.0, max_steps=1), true)
        for grid in (UniformGrid(), AdaptiveGrid())
    )
    assert adaptive < 0.5 * uniform


def test_batch():
    solver = _solver(GaussLegendre(4), 64, AdaptiveGrid(), ConstantGuess())
    mus = jnp.array([1.0, 2.0, 4.0])
    batch = jax.vmap(lambda mu: _solve(solver, mu))(mus)
    for i, mu in enumerate(mus):
        sol = _solve(solver, mu)
        state = jax.tree_util.tree_map(lambda x: x[i], batch.solver_state)
        assert max_error(batch.ys[i], sol.ys) < 1e-8
        assert max_error(state.fractions, sol.solver_state.fractions) < 1e-8
    grids = batch.solver_state.fractions
    assert max_error(grids[0], grids[2]) > 0.01


def test_warm_start():
    def solve(solver_state, adjoint: Any = diffrax.RecursiveCheckpointAdjoint()):
        return diffeqsolve(
            *(ODETerm(van_der_pol), solver, 0.0, T, T, Y0, 5.0),
            saveat=SaveAt(t1=True, solver_state=True),
            solver_state=solver_state,
            adjoint=adjoint,
            max_steps=1,
        )

    solver = _solver(GaussLegendre(4), 128, AdaptiveGrid(), ConstantGuess())
    first = solve(None)
    again = solve(first.solver_state)
    states = first.solver_state, again.solver_state
    assert max_error(first.ys, again.ys) < 1e-8
    assert max_error(states[0].fractions, states[1].fractions) < 1e-12
    assert states[1].num_iterations <= 3 < states[0].num_iterations
    solver = _solver(GaussLegendre(4), 128, UniformGrid(), None)
    for adjoint in (diffrax.RecursiveCheckpointAdjoint(), DeerAdjoint()):
        with pytest.raises(ValueError, match="the same kind of `grid`"):
            solve(states[0], adjoint)


def test_windows():
    # Adaptive windows grow to what well-placed points can do.
    def num_steps(grid, adjoint):
        return diffeqsolve(
            *(ODETerm(van_der_pol), _solver(RadauIIA(3), 64, grid, None)),
            *(0.0, 100.0, 0.1, Y0, 50.0),
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6),
            adjoint=adjoint,
        ).stats["num_steps"]

    adjoint = diffrax.RecursiveCheckpointAdjoint()
    many = num_steps(UniformGrid(), adjoint)
    assert 2 * num_steps(AdaptiveGrid(), adjoint) <= many
    assert 2 * num_steps(AdaptiveGrid(), DeerAdjoint()) <= many


def test_event(true):
    # With `DeerAdjoint`, in whichever substep it is.
    sol = diffeqsolve(
        *(ODETerm(van_der_pol), _solver(diffrax.Tsit5(), 256, AdaptiveGrid(), None)),
        *(0.0, T, T, Y0, 5.0),
        event=diffrax.Event(
            lambda t, y, args, **kwargs: y[0] + 1, optx.Newton(1e-10, 1e-10)
        ),
        adjoint=DeerAdjoint(),
        max_steps=1,
    )
    index = jnp.argmax(true[:, 0] < -1)
    ts = jnp.linspace(0, T, 101)
    assert ts[index - 1] < sol.ts[0] < ts[index]
    assert max_error(sol.ys[0, 0], -1.0) < 1e-8


def test_extrapolation():
    # Windows follow one another, each on a grid of its own.
    def solve(guess):
        solver = _solver(GaussLegendre(4), 32, AdaptiveGrid(), guess)
        return diffeqsolve(
            *(ODETerm(van_der_pol), solver, 0.0, T, 0.1, Y0, 2.0),
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
        ).ys

    constant, extrapolated = solve(ConstantGuess()), solve(ExtrapolationGuess())
    assert max_error(constant, extrapolated) < 1e-6


def test_diagnose():
    solver = _solver(GaussLegendre(4), 64, AdaptiveGrid(), ConstantGuess())
    report = diagnose(ODETerm(van_der_pol), solver, 0.0, T, T, Y0, 2.0)
    assert "1 of 64 substeps" in str(report)
    lengths = np.diff(report.fractions[0])
    assert np.max(lengths) > 1.5 * np.min(lengths)
    report.plot()

    grid = AdaptiveGrid(rtol=1e-8, atol=1e-8)
    solver = _solver(GaussLegendre(4), 64, grid, ConstantGuess())
    report = diagnose(ODETerm(van_der_pol), solver, 0.0, T, T, Y0, 2.0)
    assert report.required_substeps is not None and report.required_substeps > 64
    assert report.recommended_substeps == report.required_substeps
    assert "too few substeps for the tolerance" in report.advice[0]


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
def test_spread(dtype):
    uniform = jnp.linspace(0, 1, 65, dtype=dtype)
    middles = (uniform[1:] + uniform[:-1]) / 2
    density = 1 / (0.2 + jnp.abs(middles - 0.7))
    new, gain = spread(uniform, Shares(density / 64, 5.0), 1e-5)
    assert new.dtype == dtype
    assert new[0] == 0 and new[-1] == 1
    lengths = jnp.diff(new)
    # Where the middle of a new substep is.
    shares = lengths / (0.2 + jnp.abs((new[1:] + new[:-1]) / 2 - 0.7))
    assert jnp.max(shares) / jnp.min(shares) < 1.3
    assert gain > 2

    # A jump, which the grid has to get close to by and by.
    step = jnp.where(middles < 0.5, 1e-6, 1.0).astype(dtype)
    new, _ = spread(uniform, Shares(step, 2.0), 1e-5)
    lengths = jnp.diff(new)
    assert jnp.all(lengths > 0)
    ratios = lengths[1:] / lengths[:-1]
    assert jnp.max(jnp.maximum(ratios, 1 / ratios)) < 2.5

    # All of the error in the first of them: some are kept elsewhere.
    one = jnp.zeros(256, dtype).at[0].set(1)
    new, _ = spread(jnp.linspace(0, 1, 257, dtype=dtype), Shares(one, 5.0), 1e-5)
    assert 8 / 256 < jnp.max(jnp.diff(new)) < 12 / 256


@pytest.mark.parametrize("value", (0.0, 1.0, jnp.nan, jnp.inf))
def test_spread_without_knowledge(value):
    uniform = jnp.linspace(0, 1, 17)
    shares = jnp.zeros(16).at[3].set(value) if value != 1 else jnp.ones(16)
    new, gain = spread(uniform, Shares(shares, 5.0), 1e-5)
    assert max_error(new, uniform) < 1e-12
    assert abs(gain - 1) < 1e-12


@pytest.mark.parametrize("substeps", (1, 2, 3))
def test_few_substeps(substeps):
    for tol in (None,) if substeps == 1 else (None, 1e-2):
        grid = AdaptiveGrid(rtol=tol, atol=tol)
        sol = diffeqsolve(
            *(
                ODETerm(lambda t, y, args: -y),
                _solver(diffrax.Tsit5(), substeps, grid, None),
            ),
            *(0.0, 1.0, 1.0, jnp.array([1.0])),
            saveat=SaveAt(t1=True, solver_state=True),
            max_steps=1,
        )
        assert sol.solver_state.fractions.shape == (substeps + 1,)
        assert max_error(sol.ys[0, 0], jnp.exp(-1.0)) < 1e-2


def test_no_state():
    grid = AdaptiveGrid(rtol=1e-3, atol=1e-3)
    sol = diffeqsolve(
        *(ODETerm(lambda t, y, args: y), _solver(diffrax.Tsit5(), 8, grid, None)),
        *(0.0, 1.0, 1.0, jnp.zeros(0)),
        saveat=SaveAt(t1=True, solver_state=True),
        max_steps=1,
    )
    assert sol.ys.shape == (1, 0)
    assert max_error(sol.solver_state.fractions, jnp.linspace(0, 1, 9)) < 1e-12


def test_errors():
    with pytest.raises(ValueError, match="both be given"):
        AdaptiveGrid(rtol=1e-3)
    with pytest.raises(ValueError, match=r"AdaptiveGrid\(rtol=...\)"):
        AdaptiveGrid(rtol=-1.0, atol=1e-3)
    with pytest.raises(TypeError, match=r"AdaptiveGrid\(max_moves=...\)"):
        AdaptiveGrid(max_moves=1.5)  # pyright: ignore
    with pytest.raises(TypeError, match=r"Did you mean `AdaptiveGrid\(\)`"):
        DeerSolver(grid=AdaptiveGrid)  # pyright: ignore
    with pytest.raises(ValueError, match="more `substeps`"):
        grid = AdaptiveGrid(rtol=1e-3, atol=1e-3)
        _solve(_solver(diffrax.Tsit5(), 1, grid, None))
