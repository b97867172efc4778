"""`solver_state` is the warm start."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from diffrax import ODETerm
from diffrax_deer import ConstantGuess, DeerSolver

from .helpers import diffeqsolve, max_error, problem, SaveAt, sequential


solver = DeerSolver(diffrax.Tsit5(), 64, guess=ConstantGuess())


@eqx.filter_jit
def _solve(args, state=None, *, t1=6.0, windows=1, solver=solver):
    term, y0, _ = problem()
    return diffeqsolve(
        term,
        solver,
        0,
        t1,
        t1 / windows,
        y0,
        args,
        saveat=SaveAt(t1=True, solver_state=True),
        solver_state=state,
    )


def test_trajectory():
    term, y0, args = problem()
    state = _solve(args, windows=2).solver_state
    ts = np.linspace(0, 6, 129)
    ref = sequential(term, diffrax.Tsit5(), ts, y0, args, saveat=SaveAt(steps=True))
    assert (state.t0, state.t1) == (3.0, 6.0)
    assert state.num_iterations.dtype == jnp.int32
    assert max_error(state.ys, ref.ys[64:]) < 1e-10


def test_warm_start():
    def two_body(t, y, gravity):
        r, v = y
        return v, -gravity * r / jnp.sum(r**2) ** 1.5

    @jax.jit
    def solve(gravity, state=None):
        return diffeqsolve(
            ODETerm(two_body),
            DeerSolver(diffrax.Tsit5(), 256, guess=ConstantGuess()),
            0,
            10,
            10,
            (jnp.array([1.0, 0.0]), jnp.array([0.0, 0.7])),
            gravity,
            saveat=SaveAt(t1=True, solver_state=True),
            solver_state=state,
        )

    first = solve(1.0)
    cold = solve(1.0001)
    warm = solve(1.0001, first.solver_state)
    assert max_error(warm.ys, cold.ys) < 1e-10
    assert warm.solver_state.num_iterations <= cold.solver_state.num_iterations / 2
    # Of the same problem once more, it remains only to see that this is the solution.
    again = solve(1.0, first.solver_state)
    assert again.solver_state.num_iterations <= 3


def test_only_for_the_same_window():
    first = _solve(0.9)
    state = eqx.tree_at(
        lambda s: s.ys, first.solver_state, jnp.full_like(first.solver_state.ys, 1e6)
    )
    # A bad guess of this window, so it takes longer...
    bad = _solve(0.9, state)
    assert bad.solver_state.num_iterations > first.solver_state.num_iterations
    # ...though it does not matter for the solution...
    assert max_error(bad.ys, first.ys) < 1e-10
    # ...but for another window it does not count.
    other = _solve(0.9, state, t1=5.0)
    expected = _solve(0.9, t1=5.0)
    assert other.solver_state.num_iterations == expected.solver_state.num_iterations
    assert jnp.array_equal(other.ys, expected.ys)


def test_nonfinite_guess():
    first = _solve(0.9)
    state = eqx.tree_at(
        lambda s: s.ys,
        first.solver_state,
        first.solver_state.ys.at[10:].set(jnp.nan),
    )
    assert max_error(_solve(0.9, state).ys, first.ys) < 1e-10


def test_vmap():
    args = jnp.array([0.9, 0.3])
    first = jax.vmap(_solve)(args)
    second = jax.vmap(_solve)(1.001 * args, first.solver_state)
    assert second.solver_state.ys.shape == (2, 64, 3)
    for i in range(2):
        assert max_error(second.ys[i], _solve(1.001 * args[i]).ys) < 1e-10
