"""The report on a solve says what the solve itself does, and gives sound advice."""

import dataclasses
import inspect
from typing import Any, cast

import diffrax
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from diffrax import ODETerm, RESULTS
from diffrax_deer import (
    ConstantGuess,
    DeerAdjoint,
    DeerSolver,
    diagnose,
    ELK,
    QuasiDEER,
    RadauIIA,
)

from .helpers import diffeqsolve, lorenz, over_time, SaveAt, van_der_pol


matplotlib.use("Agg")
tsit5 = diffrax.Tsit5()
term = ODETerm(lambda t, y, args: van_der_pol(t, y, 2.0))
y0 = jnp.array([2.0, 0.0])


def test_single_window():
    solver = DeerSolver(tsit5, 256, guess=ConstantGuess())
    report = diagnose(term, solver, 0, 10, 10, y0)
    assert report.result == RESULTS.successful
    assert report.ts.tolist() == [0, 10]
    (residuals,), (fronts,) = report.residuals, report.fronts
    assert len(residuals) == len(fronts) == report.num_iterations[0] + 1
    assert residuals[-1] < 1e-12 < 1e-3 < residuals[0]
    # What is solved remains so, and at the end that is all of it.
    assert np.all(np.diff(fronts) >= 0)
    assert fronts[-1] == 256
    assert report.num_iterations[0] > 15
    # The vector field and its Jacobian, each time.
    assert report.sequential_evaluations[0] <= 2 * report.num_iterations[0]
    assert f"{report.sequential_evaluations[0]} evaluations" in str(report)
    # What would follow one another otherwise.
    assert report.span == report.sequential_evaluations[0]
    assert report.sequential == 6 * 256 + 1
    # Only with other windows or another guess: damping hardly ever pays.
    for word in ("substeps=", "NestedGuess()"):
        assert word in str(report)
    assert "ELK" not in str(report)
    figure = report.plot()
    assert len(figure.axes) == 2
    plt.close(figure)


def test_advice_helps():
    # Follow it until it says that there is nothing left to do.
    solver, dt0 = DeerSolver(tsit5, 256, guess=ConstantGuess()), 10.0
    report = diagnose(term, solver, 0, 10, dt0, y0)
    for _ in range(2):
        substeps = report.recommended_substeps
        if substeps is None:
            break
        dt0 = dt0 * substeps / solver.substeps
        solver = DeerSolver(tsit5, substeps, guess=ConstantGuess())
        report = diagnose(term, solver, 0, 10, dt0, y0)
    assert 1 <= report.num_iterations.max() <= 15
    assert solver.substeps >= 8
    # With more iterations, it would depend on rounding errors how many exactly.
    sol = diffeqsolve(term, solver, 0, 10, dt0, y0, adjoint=DeerAdjoint())
    stats = [sol.stats[k] for k in ("num_iterations", "max_window_iterations")]
    assert stats == [report.num_iterations.sum(), report.num_iterations.max()]


def test_adaptive_and_chaotic():
    report = diagnose(
        ODETerm(lorenz),
        DeerSolver(tsit5, 64, method=ELK()),
        *(0, 100, None, jnp.ones(3)),
        stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
        max_steps=512,
    )
    assert report.ts[0] == 0 and report.ts[-1] == 100
    assert len(report.ts) == len(report.num_iterations) + 1
    assert report.num_rejected > 0
    # Rejected windows took their time, too.
    assert report.span > report.sequential_evaluations.sum()
    # It is 0.906. (Sprott, Chaos and Time-Series Analysis, 2003.)
    assert 0.75 < report.lyapunov < 1.05


def test_lyapunov_of_a_linear_equation():
    term = ODETerm(lambda t, y, args: jnp.array([-2.0, -0.5]) * y)
    report = diagnose(term, DeerSolver(tsit5, 64), 1, 41, 10, y0 + 1)
    assert abs(report.lyapunov + 0.5) < 0.05
    # Backwards in time.
    report = diagnose(term, DeerSolver(tsit5, 64), 1, -39, -10, y0 + 1)
    assert report.ts.tolist() == [1, -9, -19, -29, -39]
    assert abs(report.lyapunov - 2.0) < 0.05


def test_failure():
    solver = DeerSolver(tsit5, 256, guess=ConstantGuess(), max_iters=7)
    report = diagnose(term, solver, 0, 10, 10, y0)
    assert report.result != RESULTS.successful
    assert report.num_iterations.tolist() == [7]
    assert 7 <= report.fronts[0][-1] < 256
    assert "substeps=" in str(report)
    plt.close(report.plot())


def test_where_there_is_no_solution():
    # Which ends at t=1.
    def run(controller):
        call = ODETerm(lambda t, y, args: y**2), solver, 0, 3, 0.75, jnp.ones(1)
        return diagnose(*call, stepsize_controller=controller, max_steps=32)

    solver = DeerSolver(tsit5, 16, guess=ConstantGuess())
    report = run(diffrax.ConstantStepSize())
    assert "Between t=0.75 and t=1.5 not all values are finite" in str(report)
    report = run(diffrax.PIDController(1e-3, 1e-6))
    assert "It got as far as t=" in str(report)
    # All that was not rejected has been solved.
    assert report.recommended_substeps is None


def test_memory_and_large_states():
    size = 64
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)) / 8)
    term = ODETerm(lambda t, y, args: dict(a=jnp.tanh(weight @ y["a"])))
    state = dict(a=jnp.ones(size, jnp.float32))

    def report(method):
        guess = ConstantGuess()
        solver = DeerSolver(diffrax.Euler(), 32, method=method, guess=guess)
        return diagnose(term, solver, 0, 1, 1, state)

    full, diagonal = report(ELK()), report(QuasiDEER())
    assert full.memory is not None and diagonal.memory is not None
    assert full.memory > 4 * 32 * size**2 > diagonal.memory
    assert "QuasiDEER" in str(full) and "QuasiDEER()" not in str(diagonal)


def test_on_a_cpu():
    # Where the default is the wrapped solver.
    report = diagnose(term, DeerSolver(tsit5, 64), 0, 5, 5, y0)
    assert report.is_sequential and report.recommended_substeps is None
    assert "nothing was solved jointly" in str(report)
    # An implicit Euler step of length 1/4 has a solution up to an initial value of 1.
    square = ODETerm(lambda t, y, args: y**2)
    report = diagnose(square, DeerSolver(diffrax.ImplicitEuler(), 4), 0, 1, 1, 3.0)
    assert report.result == RESULTS.nonlinear_max_steps_reached
    assert "Try shorter steps" in str(report)


def test_sharding():
    # What is divided over devices is solved jointly, on a CPU as well.
    solver = DeerSolver(tsit5, 64, sharding=over_time(4))
    report = diagnose(term, solver, 0, 5, 5, y0)
    sol = diffeqsolve(term, solver, 0, 5, 5, y0, adjoint=DeerAdjoint())
    assert not report.is_sequential
    assert report.num_iterations.sum() == sol.stats["num_iterations"] > 1


def test_unstable():
    # Not only would shorter windows of the same steps not help, nor is this a solution.
    term = ODETerm(lambda t, y, args: -1000 * (y - jnp.cos(t)))
    solver = DeerSolver(tsit5, 64, guess=ConstantGuess())
    report = diagnose(term, solver, 0, 1, 1, jnp.zeros(1))
    assert report.recommended_substeps is None
    assert report.amplification > 1e3
    assert "unstable" in str(report) and "RadauIIA" in str(report)
    # As it says.
    report = diagnose(
        *(term, DeerSolver(RadauIIA(3), 64), 0, 1, 1, jnp.zeros(1)),
        stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
    )
    assert report.result == RESULTS.successful
    assert "unstable" not in str(report) and report.sequential is None
    assert report.memory is not None


def test_stay_sequential():
    # The logistic map, which is chaotic: nearly as many iterations as steps.
    term = ODETerm(lambda t, y, args: 2.9 * y * (1 - y))
    solver = DeerSolver(diffrax.Euler(), 64, guess=ConstantGuess())
    report = diagnose(term, solver, 0, 64, 64, jnp.array(0.3))
    assert report.result == RESULTS.successful
    assert report.sequential == 64 < report.span
    assert "Stay sequential" in str(report)


def test_arguments_of_diffeqsolve():
    # All of them, as in a call of `diffeqsolve`, and what matters is passed on.
    kwargs = dict(
        saveat=SaveAt(ts=jnp.linspace(0, 1, 3), solver_state=True),
        stepsize_controller=diffrax.ConstantStepSize(),
        adjoint=DeerAdjoint(),
        event=diffrax.Event(lambda t, y, args, **kwargs: y[0] < 1.5),
        max_steps=None,
        throw=True,
        progress_meter=diffrax.NoProgressMeter(),
        solver_state=None,
        controller_state=None,
        made_jump=None,
    )
    assert set(kwargs) <= set(inspect.signature(diffrax.diffeqsolve).parameters)
    solver = DeerSolver(tsit5, 8, guess=ConstantGuess())
    call = (term, solver, 0, 8, 0.5, y0)
    report = diagnose(*call, **cast(Any, kwargs))
    assert report.result == RESULTS.event_occurred
    assert report.ts[-1] < 8
    # Others than `DeerAdjoint` may miss it.
    missed = "Events are looked for"
    assert missed not in str(report)
    assert missed in str(dataclasses.replace(report, may_miss_events=True))
    del kwargs["adjoint"]
    assert diagnose(*call, **cast(Any, kwargs)).may_miss_events
    # A warm start.
    state = diffeqsolve(
        *call[:3], 0.5, *call[4:], saveat=SaveAt(t1=True, solver_state=True)
    ).solver_state
    report = diagnose(*call, solver_state=state)
    assert report.num_iterations[0] < report.num_iterations[1]


def test_nothing_to_solve():
    report = diagnose(term, DeerSolver(), 0, 0, 1, y0)
    assert len(report.num_iterations) == 0
    assert "not a single window" in str(report)


def test_empty_state():
    report = diagnose(ODETerm(lambda t, y, args: y), DeerSolver(), 0, 1, 1, None)
    assert report.result == RESULTS.successful
    assert report.size == 0
    assert np.isnan(report.lyapunov)
    assert "size 0" in str(report)


def test_bad_input():
    with pytest.raises(TypeError, match=r"Wrap it: `DeerSolver\(Tsit5"):
        diagnose(term, cast(Any, tsit5), 0, 1, 1, y0)
    with pytest.raises(TypeError, match=r"diagnose\(solver=...\)"):
        diagnose(term, cast(Any, DeerSolver), 0, 1, 1, y0)
    with pytest.raises(TypeError, match="jit"):
        jax.jit(lambda y0: diagnose(term, DeerSolver(), 0, 1, 1, y0).ts)(y0)
