"""The window as one block system: its unknowns, its residual, its elimination."""

import functools as ft
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from diffrax import ODETerm
from diffrax_deer import (
    ConstantGuess,
    DEER,
    DeerSolver,
    GaussLegendre,
    QuasiDEER,
    RadauIIA,
    SequentialScan,
)
from diffrax_deer._implicit.linear import direct, iterative, linear_solve, linearised
from diffrax_deer._window import Iterate, Substep, tableau_of
from jax.flatten_util import ravel_pytree

from .helpers import (
    discretised,
    explicit_solvers,
    max_error,
    problem,
    root_finder,
    solver_id,
)


def _imex(solver):
    term, y0, args = problem()
    return solver, diffrax.MultiTerm(term, ODETerm(lambda t, y, _: -2 * y)), y0, args


implicit_solvers = (
    diffrax.ImplicitEuler(root_finder=root_finder),
    diffrax.Kvaerno3(root_finder=root_finder),
    diffrax.Kvaerno4(root_finder=root_finder),
    diffrax.Kvaerno5(root_finder=root_finder),
    GaussLegendre(1),
    GaussLegendre(3),
    RadauIIA(2),
)
imex_solvers = (
    diffrax.KenCarp3(root_finder=root_finder),
    diffrax.KenCarp4(root_finder=root_finder),
    diffrax.KenCarp5(root_finder=root_finder),
    diffrax.Sil3(root_finder=root_finder),
)
opaque_solvers = (diffrax.HalfSolver(diffrax.Heun()),)
solvers = (*explicit_solvers, *implicit_solvers, *imex_solvers, *opaque_solvers)
# Of each kind of equations one, or one with a single and one with more stages.
kinds = (
    diffrax.Euler(),
    diffrax.Heun(),
    diffrax.ImplicitEuler(root_finder=root_finder),
    diffrax.Kvaerno3(root_finder=root_finder),
    GaussLegendre(1),
    RadauIIA(2),
    diffrax.KenCarp3(root_finder=root_finder),
    diffrax.Sil3(root_finder=root_finder),
    *opaque_solvers,
)


# One by one, operations take longer to compile than all of them at once.
jit = eqx.filter_jit(lambda fn, *args: fn(*args))


def _problem(solver, substeps=5):
    if solver in imex_solvers:
        _, terms, y0, args = _imex(solver)
    else:
        terms, y0, args = problem()
    ts = jnp.linspace(0.3, 1.1, substeps + 1)
    return discretised(solver, terms, args, ts, y0)


@ft.cache
def _sequential(solver):
    """The unknowns that the solver itself arrives at."""
    discretisation = _problem(solver)
    scheme = discretisation.scheme

    def step(y0, x):
        t0, t1, _ = x
        inputs = scheme.terms, t0, t1, y0, scheme.args
        y1, _, infos, _, _ = solver.step(*inputs, solver.init(*inputs), False)
        ks = scheme.stages(t0, t1, y0, y1, infos)
        return y1, (scheme.ravel(y1), ks)

    def solve():
        _, at = jax.lax.scan(step, scheme.y0, discretisation.window.xs)
        return scheme.unknowns(Iterate(*at))

    return jit(solve)


def _outputs(discretisation, at):
    return discretisation.outputs(discretisation.whole(at))


@pytest.mark.parametrize("solver", solvers, ids=solver_id)
def test_outputs_are_those_of_the_solver(solver):
    # Up to what its own root finder leaves.
    discretisation, at = _problem(solver), _sequential(solver)
    outputs: Any = jit(_outputs, discretisation, at)

    def step(t0, t1, y0):
        inputs = discretisation.terms, t0, t1, y0, discretisation.args
        y1, y_error, infos, _, result = solver.step(
            *inputs, solver.init(*inputs), False
        )
        return Substep(y1, y_error, infos, result)

    y0 = discretisation.y0
    for n, (t0, t1) in enumerate(zip(discretisation.t0s, discretisation.t1s)):
        expected: Any = jit(step, t0, t1, y0)
        ours = jtu.tree_map(lambda x: x[n], outputs.dense_info)
        assert max_error(at.ys[n], expected.y1) < 1e-14
        assert max_error(ours, expected.dense_info) < 1e-14
        if expected.y_error is not None:
            if solver == GaussLegendre(1):
                assert jnp.isinf(expected.y_error).all()
            else:
                difference = outputs.y_error[n] - expected.y_error
                assert jnp.max(jnp.abs(difference)) < 1e-14
        y0 = expected.y1


@pytest.mark.parametrize("solver", (diffrax.Bosh3(), diffrax.Tsit5()), ids=solver_id)
def test_first_same_as_last(solver):
    count = []

    def vector_field(t, y, args):
        jax.debug.callback(lambda _: count.append(None), y)
        return jnp.sin(y + t)

    # The last three are of length zero.
    ts, y0 = jnp.array([0, 0.1, 0.3, 0.4, 0.7, 0.7, 0.7, 0.7]), jnp.array([1.0, 0.3])
    term = ODETerm(vector_field)
    problem = discretised(solver, term, None, ts, y0)

    def solve(**kwargs):
        count.clear()
        whole = jit(lambda: problem.whole(problem.window.sequential(), **kwargs))
        jax.effects_barrier()
        return whole.at, len(count)

    stages = solver.tableau.num_stages
    actual, evaluations = solve()
    assert evaluations == 7 * (stages - 1) + 1
    expected, evaluations = solve(may_have_gaps=True)
    assert evaluations == 7 * stages
    assert max_error(actual, expected) < 1e-15
    assert jnp.all(jnp.abs(expected.ks[3, 0, -1]) > 0.1)


@pytest.mark.parametrize("solver", solvers, ids=solver_id)
def test_residual(solver):
    # There is none at the solution, and elsewhere there is.
    window, at = _problem(solver).window, _sequential(solver)
    targets = jit(window.all_targets, at)
    assert max_error((targets.ys, targets.ks), (at.ys, at.ks)) < 1e-10

    def net_residual(ys):
        away = window.interpolated(ys)
        r = jtu.tree_map(jnp.subtract, window.all_targets(away), away)
        return window.net(r)

    assert jnp.max(jnp.abs(jit(net_residual, at.ys + 0.1))) > 1e-3


def _is_none(x):
    return x is None


def _random(like, seed):
    flat, unravel = ravel_pytree(like)
    return unravel(jr.normal(jr.key(seed), flat.shape, flat.dtype))


@pytest.mark.parametrize("solver", kinds, ids=solver_id)
def test_linearised_equations(solver):
    # Against a dense matrix, in both directions.
    window = _problem(solver).window
    at = jit(window.interpolated, jr.normal(jr.key(0), (5, 3)))
    flat_at, unravel = ravel_pytree(at)

    def residual(y0, x):
        moved = jtu.tree_map(lambda x: x, window)
        object.__setattr__(moved, "y0", y0)
        targets = moved.all_targets(unravel(x))
        return x - ravel_pytree(targets)[0]

    L0, L = jit(jax.jacfwd(residual, (0, 1)), window.y0, flat_at)
    b, start = _random(at, 1), jnp.array([0.3, -1.0, 2.0])
    expected = jnp.linalg.solve(L, ravel_pytree(b)[0] - L0 @ start)

    def solved(method):
        return direct(linearised(window, at, method), SequentialScan(), None)

    solves = [lambda: solved(DEER())]
    if window.is_explicit:
        solves += [
            lambda: iterative(window, at, solved(QuasiDEER())),
            lambda: linear_solve(window, at, DEER(), SequentialScan()),
        ]
    cotangent = _random(at, 2)
    transposed = jnp.linalg.solve(L.T, ravel_pytree(cotangent)[0])

    def both_directions(make):
        solve = make()
        return solve(start, b), jax.linear_transpose(solve, start, b)(cotangent)

    for make in solves:
        out, (out_start, out_b) = jit(both_directions, make)
        assert max_error(ravel_pytree(out)[0], expected) < 1e-9
        assert max_error(ravel_pytree(out_b)[0], transposed) < 1e-9
        assert max_error(out_start, -L0.T @ transposed) < 1e-9


@pytest.mark.parametrize("solver", (diffrax.Heun(), *opaque_solvers), ids=solver_id)
def test_all_derivatives_in_turn(solver):
    # What the equations depend on, in the loop over the substeps or all at once.
    window = _problem(solver).window
    at = jit(window.interpolated, jr.normal(jr.key(0), (5, 3)))
    start = jnp.array([0.3, -1.0, 2.0])
    floats, rest = eqx.partition(window, eqx.is_inexact_array)
    tangent = eqx.tree_at(lambda w: w.y0, _random(floats, 1), None)

    def both(tangent):
        targets = lambda floats: eqx.combine(floats, rest).all_targets(at)
        zero = jnp.zeros(3)
        of_all = eqx.tree_at(lambda w: w.y0, tangent, zero, is_leaf=_is_none)
        _, b = jax.jvp(targets, (floats,), (of_all,))
        solve = linear_solve(window, at, DEER(), SequentialScan())
        return window.derivative(at, tangent, start, None), solve(start, b)

    actual, expected = jit(both, tangent)
    assert max_error(ravel_pytree(expected)[0], 0 * ravel_pytree(at)[0]) > 0.1
    assert max_error(actual, expected) < 1e-12


@pytest.mark.parametrize("solver", kinds, ids=solver_id)
def test_diagonal_jacobians(solver):
    # Of components that do not depend on each other they are all there is.
    terms = ODETerm(lambda t, y, args: jnp.sin(y) * jnp.cos(t))
    if solver in imex_solvers:
        terms = diffrax.MultiTerm(terms, ODETerm(lambda t, y, args: -(y**3)))
    ts, y0 = jnp.linspace(0, 1, 5), jnp.array([1.0, 0.3, -2.0])
    window = discretised(solver, terms, None, ts, y0).window
    at = jit(window.interpolated, jr.normal(jr.key(0), (4, 3)))
    r = _random(at, 1)
    methods = (DEER(), QuasiDEER(), QuasiDEER(samples=1, key=jr.key(3)))

    def solve(method):
        out = direct(linearised(window, at, method), SequentialScan(), None)(
            jnp.ones(3), r
        )
        return ravel_pytree(out)[0]

    expected, *others = jit(lambda: [solve(method) for method in methods])
    for other in others:
        assert max_error(other, expected) < 1e-11


@pytest.mark.parametrize(
    "solver", (diffrax.Bosh3(), implicit_solvers[1], GaussLegendre(2)), ids=solver_id
)
def test_blocks_of_jacobians(solver):
    # Of pairs that do not depend on other pairs they are all there is.
    def vector_field(t, y, args):
        q, p = y
        return p * jnp.cos(q), q * jnp.sin(p) - q

    y0 = (jnp.array([1.0, 0.3, -2.0]), jnp.array([0.2, -1.0, 0.5]))
    ts = jnp.linspace(0, 1, 5)
    problem = discretised(solver, ODETerm(vector_field), None, ts, y0)
    at = problem.window.interpolated(jr.normal(jr.key(0), (4, 6)))
    start, r = jr.normal(jr.key(1), (6,)), _random(at, 2)

    def both(method):
        solve = direct(linearised(problem.window, at, method), SequentialScan(), None)
        return solve(start, r), jax.linear_transpose(solve, start, r)(r)

    expected = both(DEER())
    for method in (QuasiDEER(block=2), QuasiDEER(samples=1, block=2)):
        assert max_error(both(method), expected) < 1e-11


@pytest.mark.parametrize("solver", (*explicit_solvers, *imex_solvers), ids=solver_id)
def test_tableaus(solver):
    tableau = tableau_of(solver)
    if isinstance(solver, diffrax.Euler):
        # A single evaluation in any case.
        assert tableau is None
        return
    assert tableau is not None
    np.testing.assert_allclose(tableau.A.sum(-1), tableau.c, atol=1e-12)
    np.testing.assert_allclose(tableau.b.sum(-1), 1, atol=1e-12)
    assert tableau.is_explicit == (solver in explicit_solvers)
    assert tableau.is_diagonally_implicit


def test_solvers_of_ones_own():
    class Changed(diffrax.Heun):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    assert tableau_of(Changed()) is None
    assert tableau_of(diffrax.HalfSolver(diffrax.Heun())) is None


def test_interpolation():
    discretisation = _problem(diffrax.Tsit5(), 40)
    at = jit(discretisation.window.sequential)
    ts = jnp.array([0.3, 0.52, 1.1])
    exact: Any = diffrax.diffeqsolve(
        *(discretisation.terms, diffrax.Dopri8(), 0.3, 1.1, 0.01),
        *(discretisation.y0, discretisation.args),
        saveat=diffrax.SaveAt(ts=ts),
    ).ys
    assert max_error(jit(discretisation.evaluate, at, ts), exact) < 1e-8
    infos = jit(_outputs, discretisation, at).dense_info
    info = jtu.tree_map(lambda x: x[11], infos)
    t0, t1 = discretisation.t0s[11], discretisation.t1s[11]
    interpolation = discretisation.scheme.interpolation(t0, t1, info)
    assert interpolation.t0 == discretisation.t0s[11]
    assert max_error(interpolation.evaluate(ts[1]), exact[1]) < 1e-8


def test_finite():
    window = _problem(diffrax.Heun()).window
    at = window.interpolated(jnp.ones((5, 3)).at[2, 0].set(jnp.nan))
    at = Iterate(at.ys, at.ks.at[4, 0, 1, 0].set(jnp.inf))
    finite = window.finite(at)
    assert jnp.isfinite(finite.ks).all()
    assert max_error(finite.ys[2], window.y0) == 0
    assert max_error(finite.ys[4], jnp.ones(3)) == 0


@pytest.mark.parametrize("solver", (GaussLegendre(4), RadauIIA(3)), ids=solver_id)
def test_large_implicit_systems(solver):
    # Not as a whole, and so not exactly: memory is linear in the number of stages.
    size, substeps = 40, 6
    weight = jr.normal(jr.key(0), (size, size)) / size**0.5
    term = ODETerm(lambda t, y, args: jnp.tanh(weight @ y) - y)
    ts, y0 = jnp.linspace(0, 3, substeps + 1), jnp.linspace(-1, 1, size)
    discretisation = discretised(solver, term, None, ts, y0)
    window = discretisation.window
    at = jit(window.interpolated, jr.normal(jr.key(1), (substeps, size)))

    def eliminate(at):
        _, jacobians = DEER().linearise(window, window.points(at))
        return window.eliminate(jacobians())

    system = eqx.filter_eval_shape(eliminate, at)
    assert not system.is_exact
    total = lambda tree: sum(x.size for x in jtu.tree_leaves(tree))
    # `A` is a sum of `A_stages`, so that room for these is needed in any case.
    memory = total(system) - total(system.A_stages)
    assert memory < 4.5 * solver.stages * substeps * size**2
    assert total(system.inverses) < 3 * solver.stages * substeps * size**2
    b, start = _random(at, 2), jr.normal(jr.key(3), (size,))

    def solve_and_moved(start, b):
        out = linear_solve(window, at, DEER(), SequentialScan())(start, b)
        _, moved = jax.jvp(
            lambda y0, at: eqx.tree_at(lambda w: w.y0, window, y0).all_targets(at),
            (window.y0, at),
            (start, out),
        )
        return out, moved

    out, moved = jit(solve_and_moved, start, b)
    expected = jtu.tree_map(jnp.add, moved, b)
    assert max_error((out.ys, out.ks), (expected.ys, expected.ks)) < 1e-12
    # It hardly takes more iterations.
    solve = eqx.filter_jit(DeerSolver(solver, substeps, guess=ConstantGuess()).step)
    state = DeerSolver(solver, substeps).init(term, ts[0], ts[-1], y0, None)
    *_, state, result = solve(term, ts[0], ts[-1], y0, None, state, False)
    assert result == diffrax.RESULTS.successful
    assert state.num_iterations <= 10


@pytest.mark.parametrize(
    "solver",
    (diffrax.Kvaerno3(root_finder=root_finder), GaussLegendre(2), GaussLegendre(4)),
    ids=solver_id,
)
def test_calls_of_lapack(solver):
    # On a CPU, calls that do not depend on one another may wait for each other for
    # ever: of all that has to be solved there is one inverse, and its two triangular
    # systems follow from its factorisation.
    size, substeps = 20, 4
    term = ODETerm(lambda t, y, args: jnp.tanh(y[::-1]) - y)
    ts, y0 = jnp.linspace(0, 3, substeps + 1), jnp.linspace(-1, 1, size)
    window = discretised(solver, term, None, ts, y0).window
    at = jit(window.interpolated, jnp.zeros((substeps, size)))
    b, start = _random(at, 2), jr.normal(jr.key(3), (size,))

    def value_and_gradient(at, start, b):
        # Of several right-hand sides.
        solve = jax.vmap(
            direct(linearised(window, at, DEER()), SequentialScan(), None),
            in_axes=(0, None),
        )
        out, vjp = jax.vjp(solve, jnp.stack([start, 2 * start]), b)
        return out, vjp(out)

    text: Any = jax.jit(value_and_gradient).lower(at, start, b).compile().as_text()
    calls = [line for line in text.splitlines() if "custom_call_target=" in line]
    number = lambda name: sum(name in line for line in calls)
    assert number("lapack_dgetrf") == 1
    assert number("lapack_dtrsm") <= 2
