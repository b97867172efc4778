"""Brownian motion, at many times at once."""

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest
from diffrax import (
    ControlTerm,
    diffeqsolve,
    MultiTerm,
    ODETerm,
    SaveAt,
    VirtualBrownianTree,
)
from diffrax_deer import DeerAdjoint, DeerSolver
from diffrax_deer._window.brownian import BrownianTree

from .helpers import max_error, weighted_sum


@pytest.mark.parametrize(
    "levy_area",
    (
        diffrax.BrownianIncrement,
        diffrax.SpaceTimeLevyArea,
        diffrax.SpaceTimeTimeLevyArea,
    ),
)
def test_tree(levy_area):
    scalar = jax.ShapeDtypeStruct((), jnp.float64)
    shape = (scalar, dict(a=jax.ShapeDtypeStruct((2,), jnp.float32)))
    tree = VirtualBrownianTree(-1, 2.0, 2.0**-7, shape, jr.key(0), levy_area)
    # Several in a leaf of the tree, two that are the same, and some at its nodes.
    ts = jnp.linspace(-1, 2, 81).at[40:60].add(0.003).at[5].set(0.5).sort()
    ts = ts.at[71].set(ts[70])

    @eqx.filter_jit
    def one_by_one(t0s, t1s):
        evaluate = lambda ts: tree.evaluate(*ts, use_levy=True)
        return lax.map(evaluate, (t0s, t1s))

    @eqx.filter_jit
    def at_once(t0s, t1s):
        evaluate = lambda *ts: BrownianTree(tree).evaluate(*ts, use_levy=True)
        return jax.vmap(evaluate)(t0s, t1s)

    # A grid, that backwards, and what is none.
    for t0s, t1s in (
        (ts[:-1], ts[1:]),
        (ts[-2::-1], ts[:0:-1]),
        (ts[:-1], ts[-1:0:-1]),
    ):
        t0s, t1s = jnp.minimum(t0s, t1s), jnp.maximum(t0s, t1s)
        actual, expected = at_once(t0s, t1s), one_by_one(t0s, t1s)
        # Over short intervals the rounding errors of areas are large.
        double, single = eqx.partition(actual, lambda x: x.dtype == jnp.float64)
        is_double = lambda x: x.dtype == jnp.float64
        ref_double, ref_single = eqx.partition(expected, is_double)
        assert max_error(double, ref_double) < 1e-9
        assert max_error(single.W, ref_single.W) < 1e-5
        assert jtu.tree_structure(actual) == jtu.tree_structure(expected)


def _langevin(path):
    drift = diffrax.UnderdampedLangevinDriftTerm(0.7, 1.3, lambda x, args: jnp.sin(x))
    diffusion = diffrax.UnderdampedLangevinDiffusionTerm(0.7, 1.3, path)
    return MultiTerm(drift, diffusion), (jnp.array([0.3]), jnp.array([-0.2]))


def _general(path):
    drift = ODETerm(lambda t, y, args: -args * jnp.sin(y))
    diffusion = ControlTerm(lambda t, y, args: args * jnp.cos(y)[:, None], path)
    return MultiTerm(drift, diffusion), jnp.array([1.0, -0.4])


@pytest.mark.filterwarnings("ignore:.*is not marked as converging")
@pytest.mark.parametrize(
    "problem,solver,levy_area,is_joint",
    (
        (_general, diffrax.Euler(), diffrax.BrownianIncrement, False),
        # Which asks for the control over other steps.
        (
            _general,
            diffrax.HalfSolver(diffrax.Euler()),
            diffrax.BrownianIncrement,
            True,
        ),
        (_general, diffrax.GeneralShARK(), diffrax.SpaceTimeLevyArea, True),
        (_langevin, diffrax.QUICSORT(), diffrax.SpaceTimeTimeLevyArea, True),
    ),
    ids=("euler", "half", "shark", "quicsort"),
)
def test_solvers(problem, solver, levy_area, is_joint):
    def loss(inputs, key, solver, adjoint):
        args, scale = inputs
        path = VirtualBrownianTree(0, 1, 2.0**-6, (1,), key, levy_area)
        terms, y0 = problem(path)
        y0 = jtu.tree_map(lambda y: scale * y, y0)
        saveat = SaveAt(ts=jnp.array([0.2, 0.71]), t1=True, steps=True)
        sol = diffeqsolve(
            *(terms, solver, 0, 1, 0.011, y0, args),
            saveat=saveat,
            adjoint=adjoint,
            max_steps=100,
        )
        ys = jtu.tree_map(lambda y: jnp.where(jnp.isfinite(y), y, 0), sol.ys)
        return sum(weighted_sum(y) for y in jtu.tree_leaves(ys))

    @eqx.filter_jit
    def value_and_grad(inputs, keys, solver, adjoint):
        one = lambda inputs, key: jax.value_and_grad(loss)(inputs, key, solver, adjoint)
        return jax.vmap(one)(inputs, keys)

    batch = (jnp.array([0.7, 0.6]), jnp.array([1.0, 1.1])), jr.split(jr.key(0), 2)
    deer = DeerSolver(solver, substeps=1) if is_joint else solver
    actual = value_and_grad(*batch, deer, DeerAdjoint())
    expected = value_and_grad(*batch, solver, diffrax.DirectAdjoint())
    assert max_error(actual, expected) < 1e-9
