"""On a CPU, implicit substeps are solved one after the other."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from diffrax import diffeqsolve, ODETerm, PIDController, RESULTS, SaveAt
from diffrax_deer import (
    AdaptiveGrid,
    AutoGuess,
    CoarseGuess,
    ConstantGuess,
    DeerAdjoint,
    DeerSolver,
    ExtrapolationGuess,
    GaussLegendre,
    Jacobi,
    NestedGuess,
    Picard,
    QuasiDEER,
    RadauIIA,
    UniformGrid,
)

from .helpers import max_error, solver_id, van_der_pol


square = ODETerm(lambda t, y, args: y**2)


@eqx.filter_jit
def _solve(solver, y0=jnp.array([0.1]), term=square, args=None, **kwargs) -> Any:
    return diffeqsolve(
        *(term, solver, 0.0, 2.0, 2.0, y0, args),
        saveat=SaveAt(t1=True, solver_state=True),
        throw=False,
        **kwargs,
    )


@pytest.mark.parametrize(
    "solver", (diffrax.ImplicitEuler(), diffrax.Kvaerno5(), RadauIIA(3)), ids=solver_id
)
def test_as_jointly(solver):
    in_turn = _solve(DeerSolver(solver, 16))
    jointly = _solve(DeerSolver(solver, 16, guess=ConstantGuess()))
    assert max_error(in_turn.ys, jointly.ys) < 1e-10
    assert max_error(in_turn.solver_state.ys, jointly.solver_state.ys) < 1e-10
    # Of the substep that takes the most, and of all.
    state = in_turn.solver_state
    assert 2 <= state.num_iterations <= 4
    assert 2 * 2 * 16 - 16 <= state.sequential_evaluations <= 2 * 4 * 16


def test_very_stiff():
    # Windows in which a substep has no solution, or is hard to solve, are given up as
    # soon as it is, and there are no more of them than if they were solved jointly.
    solver = DeerSolver(diffrax.Kvaerno5(), 64)

    def solve(adjoint):
        return diffeqsolve(
            *(ODETerm(van_der_pol), solver, 0.0, 2000.0, 1e-2, jnp.array([2.0, 0.0])),
            1000.0,
            stepsize_controller=PIDController(rtol=1e-4, atol=1e-6),
            adjoint=adjoint,
        )

    for adjoint in (diffrax.RecursiveCheckpointAdjoint(), DeerAdjoint()):
        sol: Any = eqx.filter_jit(solve)(adjoint)
        assert sol.stats["num_steps"] < 120
        assert max_error(sol.ys[0], np.array([1.706168, -0.000892809])) < 1e-3


def test_no_solution():
    # An implicit Euler step of length 1 has one up to an initial value of 1/4.
    solver = DeerSolver(diffrax.ImplicitEuler(), 2)
    y0s = jnp.array([[0.1], [1.0], [0.15]])
    sols = jax.vmap(lambda y0: _solve(solver, y0))(y0s)
    assert list(sols.result == RESULTS.successful) == [True, False, True]
    for n, y0 in enumerate(y0s):
        alone = _solve(solver, y0)
        failed = RESULTS.nonlinear_max_steps_reached
        assert alone.result == (failed if n == 1 else RESULTS.successful)
        assert max_error(sols.ys[n], alone.ys) < 1e-14
        assert jnp.isfinite(alone.ys).all()
        assert jnp.isfinite(alone.solver_state.ys).all()
    # The others in the batch have gone on.
    expected = _solve(DeerSolver(diffrax.ImplicitEuler(), 2, guess=ConstantGuess()))
    assert max_error(sols.ys[0], expected.ys) < 1e-10
    # An adaptive controller tries again.
    controller = PIDController(rtol=1e-4, atol=1e-6)
    sol = _solve(solver, jnp.array([0.4]), stepsize_controller=controller)
    assert sol.result == RESULTS.successful
    assert sol.stats["num_rejected_steps"] > 0
    assert max_error(sol.ys, jnp.array([[2.0]])) < 0.05


def test_max_iters():
    solver = DeerSolver(diffrax.ImplicitEuler(), 8, max_iters=1)
    assert _solve(solver).result == RESULTS.nonlinear_max_steps_reached
    # For each of the substeps.
    solver = DeerSolver(diffrax.ImplicitEuler(), 8, max_iters=4)
    assert _solve(solver).result == RESULTS.successful
    # Of Newton's method, if that is needed.
    solver = DeerSolver(diffrax.ImplicitEuler(), 8, max_iters=2)
    sol = _solve(solver, jnp.full(8, 0.1))
    assert sol.result == RESULTS.nonlinear_max_steps_reached
    assert sol.solver_state.num_iterations == 2 + 2


@pytest.mark.parametrize(
    "guess",
    (
        CoarseGuess(steps=8),
        CoarseGuess(diffrax.ImplicitEuler()),
        NestedGuess(guess=CoarseGuess()),
        ExtrapolationGuess(first=CoarseGuess()),
    ),
    ids=("fewer", "another solver", "nested", "extrapolation"),
)
def test_as_a_guess(guess):
    # Of what is then solved jointly.
    kwargs: Any = dict(term=ODETerm(van_der_pol), y0=jnp.array([2.0, 0.0]), args=2.0)
    solver = DeerSolver(diffrax.Kvaerno3(), 32, guess=guess)
    constant = DeerSolver(diffrax.Kvaerno3(), 32, guess=ConstantGuess())
    sol, expected = _solve(solver, **kwargs), _solve(constant, **kwargs)
    assert sol.result == RESULTS.successful
    assert max_error(sol.ys, expected.ys) < 1e-9
    span = lambda sol: sol.solver_state.sequential_evaluations
    assert span(sol) > span(expected)
    iterations = lambda sol: sol.solver_state.num_iterations
    assert iterations(sol) < iterations(expected)


@pytest.mark.parametrize("substeps, windows", ((4096, 1), (64, 64), (1, 4096)))
def test_single_precision(substeps, windows):
    # Small steps of a solution that moves slowly add up.
    y0, zero, one = jnp.ones(1, jnp.float32), jnp.float32(0), jnp.float32(1)
    sol = diffeqsolve(
        *(ODETerm(lambda t, y, args: -y), DeerSolver(diffrax.Kvaerno3(), substeps)),
        *(zero, one, one / windows, y0),
        adjoint=DeerAdjoint(),
    )
    assert sol.ys is not None and sol.ys.dtype == jnp.float32
    assert max_error(sol.ys, np.exp([[-1.0]])) < 1e-4


@pytest.mark.parametrize("method", (Picard(), Jacobi(), QuasiDEER(samples=1)))
def test_methods(method):
    # Also those that converge slowly.
    kwargs: Any = dict(term=ODETerm(van_der_pol), y0=jnp.array([2.0, 0.0]), args=2.0)
    sol = _solve(DeerSolver(diffrax.Kvaerno5(), 24, method=method), **kwargs)
    expected = _solve(DeerSolver(diffrax.Kvaerno5(), 24), **kwargs)
    assert sol.result == RESULTS.successful
    assert sol.solver_state.num_iterations > expected.solver_state.num_iterations
    assert max_error(sol.ys, expected.ys) < 1e-8


def _coupled(t, y, mu):
    # Van der Pol oscillators in a ring.
    x, v = jnp.split(y, 2)
    return jnp.concatenate([v, mu * ((1 - x**2) * v - x) + jnp.roll(x, 1) - x])


_imex = diffrax.MultiTerm(
    ODETerm(lambda t, y, mu: jnp.sin(t + jnp.roll(y, 1))), ODETerm(_coupled)
)


@pytest.mark.parametrize(
    "solver, size",
    (
        (diffrax.ImplicitEuler(), 8),
        (diffrax.Kvaerno5(), 8),
        (diffrax.Sil3(), 8),
        (RadauIIA(3), 8),
        (RadauIIA(3), 24),
    ),
    ids=lambda x: x if isinstance(x, int) else solver_id(x),
)
def test_large_states(solver, size):
    # One Jacobian serves all stages and iterations of each substep.
    is_imex = isinstance(solver, diffrax.Sil3)
    y0 = jnp.concatenate([jnp.linspace(1, 2, size // 2), jnp.zeros(size // 2)])
    kwargs: Any = dict(term=_imex if is_imex else ODETerm(_coupled), y0=y0, args=2.0)
    in_turn = _solve(DeerSolver(solver, 32), **kwargs)
    jointly = _solve(DeerSolver(solver, 32, guess=ConstantGuess()), **kwargs)
    assert in_turn.result == jointly.result == RESULTS.successful
    assert max_error(in_turn.solver_state.ys, jointly.solver_state.ys) < 1e-10
    state = in_turn.solver_state
    assert 5 <= state.num_iterations <= 16
    assert state.sequential_evaluations <= 32 * (state.num_iterations + 1)


def test_large_states_that_move_far():
    # Newton's method has to begin again.
    cubic = ODETerm(lambda t, y, args: -args * y**3 + jnp.roll(y, 1))
    y0, factors = jnp.linspace(1, 2, 8), jnp.array([1e-2, 1e6, 1e2])
    solver = DeerSolver(diffrax.ImplicitEuler(), 2)
    solve = lambda args: _solve(solver, y0, cubic, args)
    sols = jax.vmap(solve)(factors)
    assert (sols.result == RESULTS.successful).all()
    # Also jointly it takes more iterations than there are unknowns.
    constant = DeerSolver(diffrax.ImplicitEuler(), 2, guess=ConstantGuess())
    for n, factor in enumerate(factors):
        alone, expected = solve(factor), _solve(constant, y0, cubic, factor)
        assert alone.result == expected.result == RESULTS.successful
        assert max_error(alone.ys, expected.ys) < 1e-10
        assert max_error(sols.ys[n], alone.ys) < 1e-10
        if n > 0:
            assert alone.solver_state.sequential_evaluations > 2 * 16
            assert expected.solver_state.num_iterations > 5


def test_stages_that_differ():
    # With the Jacobian of the middle, corrections of later stages are tiny, although
    # these are wrong.
    def field(t, y, args):
        return jnp.where(t < 1.2, -1e10 * (y - 1), 5 - y)

    y0 = jnp.linspace(1.5, 3, 8)
    for solver in (RadauIIA(2), GaussLegendre(2), GaussLegendre(3)):
        sols = [
            _solve(DeerSolver(solver, 1, guess=guess), y0, ODETerm(field))
            for guess in (AutoGuess(), ConstantGuess())
        ]
        assert max_error(sols[0].ys, sols[1].ys) < 1e-10


def test_large_and_very_stiff():
    # No residual is as small as the rounding errors of values there.
    def field(t, y, args):
        return 1e4 * (jnp.roll(y, 1) + jnp.roll(y, -1) - 2 * y) - y**3 + jnp.cos(t)

    in_turn, jointly = (
        _solve(
            DeerSolver(RadauIIA(2), 32, guess=guess),
            *(jnp.linspace(-0.7, 1.3, 16), ODETerm(field)),
        )
        for guess in (AutoGuess(), ConstantGuess())
    )
    assert in_turn.result == jointly.result == RESULTS.successful
    assert max_error(in_turn.solver_state.ys, jointly.solver_state.ys) < 1e-11
    # It takes more iterations than Newton's method would, and has not been given up.
    assert in_turn.solver_state.sequential_evaluations > 8 * 32


def test_gradient_of_merged_windows():
    # Of which the guess says something else than of one of their steps.
    solver = DeerSolver(diffrax.Kvaerno5(), 1, guess=CoarseGuess(steps=1))

    def last(mu, max_steps):
        sol: Any = diffeqsolve(
            *(ODETerm(van_der_pol), solver, 0.0, 3.0, 0.12, jnp.array([2.0, 0.0]), mu),
            adjoint=DeerAdjoint(),
            max_steps=max_steps,
        )
        return sol.ys[0, 0]

    few, many = (jax.jit(jax.grad(last), static_argnums=1)(2.0, n) for n in (30, 10**5))
    assert abs(few - many) < 1e-9 * abs(few)


def _loss(mu, adjoint, grid, event, max_steps=4096):
    sol = diffeqsolve(
        *(ODETerm(van_der_pol), DeerSolver(RadauIIA(3), 16, grid=grid)),
        *(0.0, 10.0, 0.1, jnp.array([2.0, 0.0]), mu),
        saveat=SaveAt(ts=jnp.linspace(0, 2, 5), t1=True),
        stepsize_controller=PIDController(rtol=1e-8, atol=1e-10),
        adjoint=adjoint,
        event=event,
        max_steps=max_steps,
    )
    return jnp.sum(jnp.where(jnp.isfinite(sol.ys), sol.ys, 0) ** 2)  # pyright: ignore


@pytest.mark.parametrize("has_event", (False, True))
@pytest.mark.parametrize("grid", (UniformGrid(), AdaptiveGrid()))
def test_gradient(grid, has_event):
    # Substeps that have not been kept are solved for again.
    root_finder = optx.Newton(1e-12, 1e-12)
    cond_fn = lambda t, y, args, **kwargs: y[0] - 0.5
    event = diffrax.Event(cond_fn, root_finder) if has_event else None
    value_and_grad = eqx.filter_jit(jax.value_and_grad(_loss))
    at = lambda mu: value_and_grad(jnp.array(mu), DeerAdjoint(), grid, event)
    value, grad = at(5.0)
    kept_value, kept_grad = value_and_grad(
        *(jnp.array(5.0), DeerAdjoint(max_windows=64), grid, event), max_steps=128
    )
    assert abs(value - kept_value) < 1e-12 * value
    assert abs(grad - kept_grad) < 1e-9 * abs(grad)
    h = 1e-4
    (above, _), (below, _) = at(5.0 + h), at(5.0 - h)
    assert abs((above - below) / (2 * h) - grad) < 1e-4 * abs(grad)


def test_memory():
    # Of each window that is allowed the value at its start, beside times.
    def memory(max_steps):
        grad = jax.grad(lambda mu: _loss(mu, DeerAdjoint(), grid, None, max_steps))
        compiled: Any = jax.jit(grad).lower(5.0).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    grid = UniformGrid()
    per_window = (memory(16000) - memory(8000)) / 8000
    assert per_window < 2 * (2 + 2) * 8
