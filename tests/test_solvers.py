"""The answer belongs to the wrapped solver."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from diffrax import ConstantStepSize, ODETerm, PIDController
from diffrax_deer import (
    AssociativeScan,
    AutoGuess,
    ConstantGuess,
    DEER,
    DeerSolver,
    GaussLegendre,
    SolutionGuess,
)

from .helpers import (
    diffeqsolve,
    implicit_solvers,
    max_error,
    problem,
    root_finder,
    SaveAt,
    sequential,
    solver_id,
    split_problem,
)


t0, t1 = 0.2, 3.2


@eqx.filter_jit
def _deer(terms, solver, y0, args, windows, saveat, t0=t0, t1=t1):
    return diffeqsolve(
        terms, solver, t0, t1, (t1 - t0) / windows, y0, args, saveat=saveat
    )


def _compare(solver, terms, y0, args, *, substeps, windows=1, tol=1e-10, **kwargs):
    ts = np.linspace(t0, t1, windows * substeps + 1)
    points = np.linspace(t0, t1, 37)
    deer = _deer(
        terms,
        DeerSolver(solver, substeps, **kwargs),
        y0,
        args,
        windows,
        SaveAt(ts=points, t1=True, dense=True, solver_state=True),
    )
    ref = sequential(
        terms, solver, ts, y0, args, saveat=SaveAt(ts=points, t1=True, dense=True)
    )
    assert max_error(deer.ys, ref.ys) < tol
    assert deer.solver_state.num_iterations <= substeps
    # Not at a grid point, where derivatives may jump.
    t = t0 + 1.3571
    assert max_error(deer.evaluate(t), ref.evaluate(t)) < tol
    assert max_error(deer.derivative(t), ref.derivative(t)) < 1e3 * tol


# (Of all others, the values are compared in `test_all_solvers.py`.)
@pytest.mark.parametrize(
    "solver", (diffrax.Euler(), diffrax.Tsit5(), implicit_solvers[2]), ids=solver_id
)
def test_windows_and_dense_output(solver):
    _compare(solver, *problem(), substeps=5, windows=3)


def test_semi_implicit_euler():
    terms, y0, args = split_problem()
    _compare(diffrax.SemiImplicitEuler(), terms, y0, args, substeps=20, windows=2)


def test_imex():
    term, y0, args = problem()
    terms = diffrax.MultiTerm(term, ODETerm(lambda t, y, args: -2 * y))
    solver = diffrax.KenCarp3(root_finder=root_finder)
    _compare(solver, terms, y0, args, substeps=8)


class _OfParts(diffrax.AbstractSolver):
    """Euler's method, for several differential equations side by side."""

    term_structure = dict(
        ode=ODETerm, sum=diffrax.MultiTerm[tuple[ODETerm, diffrax.AbstractTerm]]
    )
    interpolation_cls = diffrax.LocalLinearInterpolation

    def init(self, terms, t0, t1, y0, args):
        pass

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        def move(term, y):
            return y + term.vf_prod(t0, y, args, term.contr(t0, t1))

        is_term = lambda x: isinstance(x, diffrax.AbstractTerm)
        y1 = jtu.tree_map(move, terms, y0, is_leaf=is_term)
        info = dict(y0=y0, y1=y1)
        return y1, None, info, None, diffrax.RESULTS.successful

    def func(self, terms, t0, y0, args):
        raise NotImplementedError


def test_terms_in_a_container():
    decay, control = ODETerm(lambda t, y, a: -a * y), lambda t0, t1: jnp.sin(t1 - t0)
    driven = diffrax.ControlTerm(lambda t, y, a: a * y, control)
    terms = dict(ode=decay, sum=diffrax.MultiTerm(decay, driven))
    y0 = dict(ode=jnp.array(1.0), sum=jnp.array([0.5, 2.0]))
    _compare(_OfParts(), terms, y0, jnp.array(0.7), substeps=5, windows=2)


@pytest.mark.parametrize("substeps", (1, 2, 200))
def test_substeps(substeps):
    _compare(diffrax.Heun(), *problem(), substeps=substeps)


def test_one_substep_takes_one_iteration():
    term, y0, args = problem()
    solver = DeerSolver(diffrax.Tsit5(), substeps=1)
    sol = _deer(term, solver, y0, args, 5, SaveAt(t1=True, solver_state=True))
    assert sol.solver_state.num_iterations == 1


@pytest.mark.parametrize(
    "kwargs",
    (
        dict(method=DEER(), guess=ConstantGuess()),
        dict(scan=AssociativeScan()),
        dict(guess=ConstantGuess()),
    ),
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_choices_do_not_change_the_answer(kwargs):
    _compare(diffrax.Tsit5(), *problem(), substeps=30, **kwargs)


@pytest.mark.parametrize("solver", (diffrax.Tsit5(), diffrax.Euler()), ids=solver_id)
def test_float32(solver):
    term, y0, args = problem(jnp.float32)
    ts = np.linspace(t0, t1, 41, dtype=np.float32)
    f32 = jnp.float32
    saveat = SaveAt(ts=ts[::4], solver_state=True)
    deer = _deer(
        term, DeerSolver(solver, 40), y0, args, 1, saveat, t0=f32(t0), t1=f32(t1)
    )
    ref = sequential(term, solver, ts, y0, args, saveat=SaveAt(ts=ts[::4]))
    assert deer.ys.dtype == jnp.float32
    assert deer.solver_state.ys.dtype == jnp.float32
    # In far fewer iterations than substeps: not stopped by rounding errors.
    assert deer.solver_state.num_iterations < 10
    assert max_error(deer.ys, ref.ys) < 1e-5


@pytest.mark.parametrize("dtype", (jnp.float16, jnp.bfloat16))
@pytest.mark.parametrize("controller", (ConstantStepSize(), PIDController(1e-2, 1e-2)))
def test_half_precision(dtype, controller):
    # Sums and linear systems are in single precision, only the vector field is not.
    solver = DeerSolver(GaussLegendre(2), 8, guess=ConstantGuess())
    sol = diffeqsolve(
        ODETerm(lambda t, y, args: jnp.stack([y[1], -y[0]])),
        *(solver, 0, 1, jnp.ones((), dtype), jnp.array([1.0, 0.0], dtype)),
        # Otherwise Diffrax would make all of it more precise.
        saveat=SaveAt(ts=jnp.ones(1, dtype)),
        stepsize_controller=controller,
    )
    assert sol.ys.dtype == dtype
    exact = np.array([np.cos(1), -np.sin(1)])
    assert max_error(sol.ys[0], exact) < 2 * jnp.finfo(dtype).eps


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
def test_many_substeps_beyond_the_tolerance(dtype):
    # The rounding errors of 4096 substeps on an unstable problem add up to more than
    # the tolerance. This must be noticed, rather than iterated on 4096 times.
    def lorenz(t, y, args):
        x, y, z = y
        return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])

    t1 = 4 if dtype == jnp.float32 else 15
    y0 = jnp.array([-8.0, 7.0, 27.0], dtype)
    guess_from = diffeqsolve(
        ODETerm(lorenz),
        diffrax.Tsit5(),
        dtype(0),
        dtype(t1),
        dtype(t1 / 4096),
        y0,
        saveat=SaveAt(steps=True),
        max_steps=4097,
    ).ys[:4096]
    ts = np.linspace(0, t1, 4097, dtype=dtype)
    path = diffrax.LinearInterpolation(ts, jnp.concatenate([y0[None], guess_from]))
    solver = DeerSolver(diffrax.Tsit5(), 4096, guess=SolutionGuess(path))
    state = solver.init(ODETerm(lorenz), dtype(0), dtype(t1), y0, None)
    out = jax.jit(
        lambda: solver.step(
            ODETerm(lorenz), dtype(0), dtype(t1), y0, None, state, False
        )
    )()
    state, result = out[3], out[4]
    assert result == diffrax.RESULTS.successful
    assert state.num_iterations < 20


def _compare_trajectories(vector_field, solver, substeps, t1, y0, tol):
    """From a constant guess, so that the iteration has something to do. Every component
    by itself, as they may be of very different magnitude.
    """
    dtype = y0.dtype.type
    ts = np.linspace(0, t1, substeps + 1, dtype=dtype)
    saveat = SaveAt(t1=True, solver_state=True)
    solver = DeerSolver(solver, substeps, guess=ConstantGuess())
    deer = diffeqsolve(
        ODETerm(vector_field), solver, dtype(0), dtype(t1), dtype(t1), y0, saveat=saveat
    )
    ref = sequential(
        ODETerm(vector_field), solver.solver, ts, y0, saveat=SaveAt(steps=True)
    )
    for i in range(y0.size):
        assert max_error(deer.solver_state.ys[:, i], ref.ys[:, i]) < tol


@pytest.mark.parametrize("scale", (1e3, 1e-3))
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
def test_components_of_different_magnitude(dtype, scale):
    # The rounding errors of the first are larger than all of the second.
    def vector_field(t, y, args):
        return jnp.stack([0 * y[0], y[1] * (1 - y[1])])

    y0 = jnp.array([scale, 1e-2], dtype)
    tol = 1e-10 if dtype == jnp.float64 else 1e-5
    _compare_trajectories(vector_field, diffrax.Tsit5(), 64, 10, y0, tol)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
def test_small_values(dtype):
    scale = 1e-9 if dtype == jnp.float32 else 1e-13

    def vector_field(t, y, args):
        return -0.6 * (y - scale * jnp.cos(t))

    y0 = scale * jnp.array([1.0, -0.5], dtype)
    tol = 1e-10 if dtype == jnp.float64 else 1e-5
    _compare_trajectories(vector_field, diffrax.Euler(), 32, 32, y0, tol)


@pytest.mark.parametrize("solver", (diffrax.Euler(), diffrax.Tsit5()), ids=solver_id)
def test_components_that_converge_at_different_rates(solver):
    # The first is found in a single iteration. Until then it hides the second.
    def vector_field(t, y, args):
        return jnp.stack([jnp.ones_like(t), -1.5 * (y[1] - 1)])

    y0 = jnp.array([0.0, 1 + 1e-6])
    _compare_trajectories(vector_field, solver, 32, 32, y0, 1e-10)


@pytest.mark.parametrize(
    "solver,order",
    (
        (diffrax.Euler(), 1),
        (diffrax.Heun(), 2),
        (diffrax.Bosh3(), 3),
        (diffrax.Tsit5(), 5),
        (implicit_solvers[0], 1),
        (implicit_solvers[1], 3),
    ),
    ids=lambda x: solver_id(x) if isinstance(x, diffrax.AbstractSolver) else str(x),
)
def test_order_of_convergence(solver, order):
    # As Diffrax tests it: regress the logarithm of the error against that of the step.
    A = jnp.array([[-0.4, 1.3], [-1.1, -0.2]])
    y0 = jnp.array([0.7, -0.4])
    term = ODETerm(lambda t, y, args: A @ y)
    exact = jax.scipy.linalg.expm(A * (t1 - t0)) @ y0
    substeps = 8
    log_errors, log_steps = [], []
    windows = (2, 4, 8, 16) if order < 5 else (6, 8, 12, 16)
    for n in windows:
        sol = _deer(
            term, DeerSolver(solver, substeps), y0, None, float(n), SaveAt(t1=True)
        )
        log_errors.append(np.log(max_error(sol.ys[0], exact)))
        log_steps.append(np.log((t1 - t0) / (n * substeps)))
    slope, _ = np.polyfit(log_steps, log_errors, 1)
    assert abs(slope - order) < 0.4
    assert DeerSolver(solver).order(term) == solver.order(term)


@pytest.mark.parametrize("guess", (AutoGuess(), ConstantGuess()))
@pytest.mark.parametrize("solver", (diffrax.Tsit5(), diffrax.Kvaerno3()))
def test_how_often_it_is_traced(solver, guess):
    # No more often than by the wrapped solver.
    def count(solver):
        number = 0

        def vector_field(t, y, args):
            nonlocal number
            number += 1
            return -y

        def solve(y0):
            controller = PIDController(rtol=1e-3, atol=1e-3)
            return diffrax.diffeqsolve(
                *(ODETerm(vector_field), solver, t0, t1, None, y0),
                stepsize_controller=controller,
            ).ys

        jax.eval_shape(solve, jnp.ones(2))
        return number

    assert count(DeerSolver(solver, guess=guess)) <= count(solver)
