"""Guesses: none of them changes the solution, and good ones make it cheaper."""

import functools as ft
from typing import Any, cast

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffrax import ODETerm
from diffrax_deer import (
    AbstractGuess,
    AutoGuess,
    CoarseGuess,
    ConstantGuess,
    DeerAdjoint,
    DeerSolver,
    ExtrapolationGuess,
    NestedGuess,
    SolutionGuess,
)
from diffrax_deer._guess.coarse_grid import coarse_grid
from diffrax_deer._window import Iterate

from .helpers import (
    diffeqsolve,
    discretised,
    exact,
    lorenz,
    max_error,
    SaveAt,
    sequential,
    van_der_pol,
)


tsit5 = diffrax.Tsit5()
y0 = jnp.array([2.0, 0.0])


@ft.partial(jax.jit, static_argnames=("windows", "substeps", "direction"))
def _solve(guess, mu=2.0, *, windows=1, substeps=256, direction=1):
    return diffeqsolve(
        # Backwards in time from the end the same solution, which is unstable there.
        ODETerm(lambda t, y, mu: direction * van_der_pol(t, y, mu)),
        DeerSolver(tsit5, substeps, guess=guess),
        0,
        direction * 10,
        direction * 10 / windows,
        y0,
        mu,
        saveat=SaveAt(t1=True, dense=True),
        max_steps=windows,
        adjoint=DeerAdjoint(),
    )


def _reference(mu=2.0):
    ts = np.linspace(0, 10, 257)
    return sequential(ODETerm(van_der_pol), tsit5, ts, y0, mu).ys


def _values(guess, term, ts, y0):
    problem = discretised(tsit5, term, None, ts, y0)
    solver = DeerSolver(tsit5, problem.substeps, guess=guess)
    at, _ = guess(problem, None, solver._solve_roughly)
    return problem.unravel_all(at.ys)


guesses = {
    "auto": AutoGuess(),
    "coarse": CoarseGuess(),
    "nested": NestedGuess(),
    "twice nested": NestedGuess(levels=2, factor=2),
    "nothing to nest": NestedGuess(levels=3, factor=300, guess=CoarseGuess()),
    "fewer steps": CoarseGuess(steps=64),
}


@pytest.mark.parametrize("guess", guesses.values(), ids=guesses)
def test_one_window(guess):
    # It takes more than 100 iterations from a constant one.
    sol = _solve(guess)
    assert max_error(sol.ys, _reference()) < 1e-9
    assert sol.stats["num_iterations"] <= 6


@pytest.mark.parametrize("size, substeps", ((2, 64), (2, 2048), (64, 64), (64, 2048)))
def test_by_platform(size, substeps, monkeypatch):
    ts, y0 = jnp.linspace(0, 10, substeps + 1), jnp.linspace(1, 2, size)
    term = ODETerm(lambda t, y, args: -y)

    def program(guess):
        return str(jax.make_jaxpr(lambda y0: _values(guess, term, ts, y0))(y0))

    assert program(AutoGuess()) == program(CoarseGuess())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    is_long = size == 64 and substeps == 2048
    expected = NestedGuess(factor=8) if is_long else ConstantGuess()
    assert program(AutoGuess()) == program(expected) != program(CoarseGuess())


@pytest.mark.parametrize("direction", (1, -1))
def test_solution(direction):
    earlier = _solve(CoarseGuess(), direction=direction)
    for mu, num_iterations in ((2.0, 3), (2.05, 8)):
        sol = _solve(SolutionGuess(earlier), mu, direction=direction)
        assert max_error(sol.ys, _reference(mu)) < 1e-9
        assert sol.stats["num_iterations"] <= num_iterations
    # Whatever the windows are.
    sol = _solve(SolutionGuess(earlier), windows=4, substeps=64, direction=direction)
    assert max_error(sol.ys, _reference()) < 1e-9
    assert sol.stats["num_iterations"] <= 4 * 3


def test_path():
    # In the other direction of time, and for only a part of it.
    ts = jnp.linspace(-5, 1, 100)
    path = diffrax.LinearInterpolation(ts, jnp.exp(-ts).astype(jnp.float32))
    solver = DeerSolver(tsit5, 32, guess=SolutionGuess(path))
    term = ODETerm(lambda t, y, args: -y)
    sol = diffeqsolve(term, solver, 0, -8, -8, 1.0, adjoint=DeerAdjoint(), max_steps=1)
    assert max_error(sol.ys, jnp.exp(8.0)[None]) < 1e-4
    guess = _values(SolutionGuess(path), term, ts[-30:], jnp.array(1.0))
    assert guess.dtype == jnp.float64
    assert max_error(guess, jnp.exp(-ts[-29:])) < 1e-3


def test_extrapolation():
    def num_iterations(guess, windows=128, substeps=8):
        sol = _solve(guess, windows=windows, substeps=substeps)
        ts = np.linspace(0, 10, windows * substeps + 1)
        reference = sequential(ODETerm(van_der_pol), tsit5, ts, y0, 2.0).ys
        assert max_error(sol.ys, reference) < 1e-9
        return sol.stats["num_iterations"]

    extrapolation = ExtrapolationGuess(first=ConstantGuess())
    constant = num_iterations(ConstantGuess())
    assert num_iterations(extrapolation) < 0.8 * constant
    # There is not much to extrapolate from, and nothing to iterate.
    assert num_iterations(extrapolation, substeps=1) <= 2 * 128
    # Windows that are far too long: as if there were no previous one. (With even longer
    # ones, rounding errors decide how many iterations it takes.)
    assert num_iterations(extrapolation, 4, 32) <= num_iterations(
        ConstantGuess(), 4, 32
    )


def test_coarse_guess():
    term = ODETerm(lambda t, y, args: jnp.stack([y[1], -y[0]]))
    y0 = jnp.array([1.0, 0.0])
    ts = jnp.linspace(0, 6, 65)
    values = jnp.stack([jnp.cos(ts[1:]), -jnp.sin(ts[1:])], axis=-1)
    for guess in (CoarseGuess(), NestedGuess(guess=ConstantGuess())):
        ys = _values(guess, term, ts, y0)
        assert ys.shape == (64, 2)
        assert max_error(ys, values) < 1e-3


def test_coarse_guess_of_a_stiff_problem():
    # Not stable with steps this large.
    term = ODETerm(lambda t, y, args: -1e3 * (y - jnp.cos(t)))
    ts = jnp.linspace(0, 1, 65)
    y0 = jnp.array([1.0])
    constant = _values(ConstantGuess(), term, ts, y0)
    for guess in (CoarseGuess(steps=16), NestedGuess()):
        assert jnp.array_equal(_values(guess, term, ts, y0), constant)


def test_padded_grid():
    # Of which a part has length zero, as of the last window that `DeerAdjoint` merges.
    term = ODETerm(lambda t, y, args: jnp.stack([y[1], -y[0]]))
    y0 = jnp.array([1.0, 0.0])
    ts = jnp.minimum(jnp.linspace(0, 12, 65), 6)
    values = exact(term, 0, 6, y0, saveat=SaveAt(ts=ts[1:])).ys
    for guess in (CoarseGuess(), NestedGuess()):
        assert max_error(_values(guess, term, ts, y0), values) < 1e-3


class _Wrong(AbstractGuess):
    out: Any

    def __call__(self, problem, previous, solve):
        return self.out, 0


@pytest.mark.parametrize(
    "out",
    (
        Iterate(jnp.zeros((8, 3)), jnp.zeros((8, 1, 7, 3))),
        Iterate(jnp.zeros((7, 2)), jnp.zeros((7, 1, 7, 2))),
        Iterate(jnp.zeros((8, 2)), jnp.zeros((8, 0, 0, 2))),
        Iterate(jnp.zeros((8, 2), jnp.float32), jnp.zeros((8, 1, 7, 2))),
        jnp.zeros((8, 2)),
        None,
    ),
    ids=("size", "substeps", "stages", "dtype", "structure", "none"),
)
def test_wrong_shape(out):
    with pytest.raises(ValueError, match=r"(?s)DeerSolver\(guess=...\).*_Wrong"):
        diffeqsolve(
            *(ODETerm(van_der_pol), DeerSolver(tsit5, 8, guess=_Wrong(out)), 0, 1, 1),
            *(y0, 2.0),
        )


def test_solution_of_another_problem():
    term = ODETerm(lambda t, y, args: -y)
    sol = diffeqsolve(term, tsit5, 0, 1, 0.1, jnp.ones(3), saveat=SaveAt(dense=True))
    solver = DeerSolver(tsit5, 8, guess=SolutionGuess(sol))
    with pytest.raises(ValueError, match="SolutionGuess"):
        diffeqsolve(term, solver, 0, 1, 1, jnp.ones(2))
    sol = diffeqsolve(term, tsit5, 0, 1, 0.1, jnp.ones(3))
    with pytest.raises(ValueError, match="dense=True"):
        SolutionGuess(sol)


@pytest.mark.parametrize(
    "make,error,message",
    (
        (lambda: ExtrapolationGuess(0), ValueError, "degree"),
        (lambda: ExtrapolationGuess(first=cast(Any, 1)), TypeError, "first"),
        (lambda: NestedGuess(levels=0), ValueError, "levels"),
        (lambda: NestedGuess(factor=cast(Any, 2.0)), TypeError, "factor"),
        (lambda: NestedGuess(guess=cast(Any, CoarseGuess)), TypeError, "guess"),
        (lambda: NestedGuess(max_iters=-1), ValueError, "max_iters"),
        (lambda: NestedGuess(solver=diffrax.ReversibleHeun()), ValueError, "solver"),
        (lambda: SolutionGuess(cast(Any, jnp.ones(3))), TypeError, "solution"),
    ),
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "substeps, padding, steps",
    ((100, 0, 25), (101, 7, 25), (100, 0, 64), (10, 90, 25), (10**6, 0, 250_000)),
)
def test_coarse_grid(substeps, padding, steps):
    # The last one of these overflows, if not done with care.
    ts = jnp.arange(substeps + 1.0)
    ts = jnp.concatenate([ts, jnp.full(padding, ts[-1])])
    grid = np.asarray(coarse_grid(ts, steps))
    assert grid.shape == (steps + 1,)
    assert grid[0] == 0 and grid[-1] == substeps
    lengths = np.diff(grid)
    assert 0 <= lengths.min() and lengths.max() - lengths.min() <= 1


def test_nested_guess_of_a_chaotic_solution():
    # The coarsest grid blows up, and the others tell nothing about the solution.
    solver = DeerSolver(tsit5, 4096, guess=NestedGuess(levels=3))
    y0 = jnp.array([0.0, 1.0, 1.05])
    sol = diffeqsolve(
        *(ODETerm(lorenz), solver, 0, 20, 20, y0),
        max_steps=1,
        adjoint=DeerAdjoint(),
    )
    # Where Tsit5 makes 28,672 evaluations.
    assert sol.stats["sequential_evaluations"] <= 600
