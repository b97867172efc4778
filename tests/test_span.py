"""What a GPU waits for: evaluations that follow one another."""

import diffrax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks._span import Count, counting
from benchmarks.span import adaptive, one_window, problems
from diffrax import ODETerm
from diffrax_deer import ConstantGuess, DeerAdjoint, DeerSolver, GaussLegendre

from .helpers import diffeqsolve


def _linear(t, y, args):
    return -y


def test_counter():
    def solve(vector_field):
        return diffeqsolve(
            *(ODETerm(vector_field), diffrax.Tsit5(), 0, 1, 0.1, jnp.ones(3)),
            max_steps=16,
        ).ys

    # The last stage of a step is the first one of the next.
    ys, count = counting(solve, _linear)()
    assert count == Count(span=61, work=61)
    assert abs(ys[0, 0] - np.exp(-1)) < 1e-6
    # A batch counts once.
    batch = lambda f: (
        jnp.sum(jnp.stack([f(0.0, x, None) for x in jnp.ones((2, 3))]))
        + jnp.sum(jnp.asarray([1.0]))
    )
    assert counting(batch, _linear)()[1].span == 2


@pytest.mark.parametrize("solver", (diffrax.Tsit5(), GaussLegendre(3)))
def test_stats(solver):
    def solve(vector_field):
        sol = diffeqsolve(
            ODETerm(vector_field),
            DeerSolver(solver, 32, guess=ConstantGuess()),
            *(0, 4, 4, jnp.ones(3)),
            max_steps=1,
            adjoint=DeerAdjoint(),
        )
        return sol.ys, sol.stats

    (_, stats), count = counting(solve, lambda t, y, args: jnp.sin(y) - y * t)()
    assert count.span == stats["sequential_evaluations"] <= 2 * stats["num_iterations"]
    assert stats["num_iterations"] < 10


@pytest.mark.parametrize("name", ("two bodies", "Lorenz", "van der Pol, 5"))
def test_shorter_than_sequential(name):
    problem = problems()[name]
    _, tsit5 = adaptive(problem, diffrax.Tsit5())(1e-6)
    (_, _, okay), deer = adaptive(problem, DeerSolver(guess=ConstantGuess()))(1e-6)
    assert okay and deer.span < tsit5.span / 6
    solver = DeerSolver(GaussLegendre(4), 128, guess=ConstantGuess())
    (_, _, okay), window = one_window(problem, solver)
    assert okay and window.span < tsit5.span / 8
