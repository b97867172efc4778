"""What `DeerAdjoint` hands back, and goes on from."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from diffrax_deer import DeerAdjoint, DeerState

from .helpers import deer, diffeqsolve, max_error, problem, SaveAt


checkpointed = diffrax.RecursiveCheckpointAdjoint()
constant = diffrax.ConstantStepSize()
heun = diffrax.Heun()
bosh3 = diffrax.Bosh3()


@pytest.mark.parametrize(
    "solver,controller",
    (
        (
            bosh3,
            diffrax.ClipStepSizeController(
                diffrax.PIDController(rtol=1e-6, atol=1e-8), jump_ts=jnp.array([1.0])
            ),
        ),
        (deer(heun, 3), diffrax.PIDController(rtol=1e-3, atol=1e-5)),
        (deer(heun, 3), constant),
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
    solver = deer(heun, 64)

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
