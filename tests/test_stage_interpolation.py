from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest
from diffrax_deer import GaussLegendre
from diffrax_deer._window import interpolation_of, tableau_of

from .helpers import max_error, solver_id, weighted_sum


def _stored(solver, y):
    """Of a step, but of random numbers."""
    tableau = tableau_of(solver)
    assert tableau is not None
    keys = iter(jr.split(jr.key(0), 100))

    def rows(*shape):
        one = lambda x: jr.normal(next(keys), (*shape, *x.shape), x.dtype)
        return jtu.tree_map(one, y)

    k = tuple(rows(tableau.stages) for _ in range(tableau.parts))
    return dict(y0=rows(), y1=rows(), k=k if tableau.is_split else k[0])


def _reals(tree):
    parts = [jnp.stack([x.real, x.imag]) for x in jtu.tree_leaves(tree)]
    return jnp.concatenate([x.ravel() for x in parts])


def _both(solver):
    ours, theirs = interpolation_of(solver), solver.interpolation_cls
    assert ours != theirs
    return ours, theirs


@pytest.mark.parametrize(
    "solver",
    [
        diffrax.Tsit5(),
        diffrax.Dopri5(),
        diffrax.Dopri8(),
        diffrax.KenCarp4(),
        GaussLegendre(3),
    ],
    ids=solver_id,
)
def test_same_as_that_of_the_solver(solver):
    # And all of its derivatives: by what is stored, by the ends of the step, by time.
    y = jnp.zeros(3, complex), dict(a=jnp.zeros(()))
    stored = _stored(solver, y)

    @eqx.filter_jit
    def run(make, stored, t0, t1, ts):
        def values(stored, t0, t1, ts):
            path = make(t0=t0, t1=t1, **stored)
            return jax.vmap(path.evaluate)(ts)

        def loss(*inputs):
            return weighted_sum(_reals(values(*inputs)))

        inputs = stored, t0, t1, ts
        along = lambda ts: jax.jvp(lambda ts: values(stored, t0, t1, ts), (ts,), (ts,))
        return (
            *(values(*inputs), along(ts)),
            jax.grad(loss, argnums=(0, 1, 2, 3))(*inputs),
            jax.jvp(lambda ts: jax.grad(loss)(stored, t0, t1, ts), (ts,), (ts,)),
        )

    inputs = stored, jnp.array(0.2), jnp.array(1.7), jnp.array([0.2, 0.9, 1.7])
    results = [_reals(run(make, *inputs)) for make in _both(solver)]
    assert max_error(*results) < 1e-12


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32, jnp.complex64])
def test_precision(dtype):
    # Diffrax's own choice, whatever the precision of time.
    solver = diffrax.Tsit5()
    stored = _stored(solver, jnp.zeros(2, dtype))
    for t in (jnp.float32(0.3), jnp.float64(0.3)):
        end = jnp.ones_like(t)
        ours, theirs = (make(t0=0 * t, t1=end, **stored) for make in _both(solver))
        value, expected = ours.evaluate(t), theirs.evaluate(t)
        assert value.dtype == expected.dtype
        assert max_error(_reals(value), _reals(expected)) < 1e-5
        differences = (path.evaluate(t, end) for path in (ours, theirs))
        assert max_error(*map(_reals, differences)) < 1e-5


def test_only_what_is_needed():
    # `Tsit5` does not interpolate from the end.
    solver = diffrax.Tsit5()
    stored = _stored(solver, jnp.zeros(2)) | dict(y1=jnp.full(2, jnp.nan))
    make, _ = _both(solver)
    assert jnp.all(jnp.isfinite(make(t0=0.0, t1=1.0, **stored).evaluate(0.3)))


def test_stages_are_not_copied():
    solver, steps, size, times = diffrax.Dopri8(), 100, 16, 1000
    make, _ = _both(solver)

    @jax.jit
    def evaluate(stored, ts):
        index = ts.astype(int)

        def one(t, t0, stored):
            return make(t0=t0, t1=t0 + 1, **stored).evaluate(t)

        stored = jtu.tree_map(lambda x: x[index], stored)
        return jax.vmap(one)(ts, index.astype(float), stored)

    stored = jax.vmap(lambda _: _stored(solver, jnp.zeros(size)))(jnp.arange(steps))
    ts = jnp.linspace(0, steps, times, endpoint=False)
    compiled: Any = evaluate.lower(stored, ts).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    # The stages of a step would take 14 times the size, for each of the times.
    assert memory < 2 * times * size * 8


def test_those_of_others_are_left_alone():
    # They may be anything. Of these two, the first one is no linear function.
    class Normalised(diffrax.LocalLinearInterpolation):
        def __init__(self, *, t0, t1, y0, y1, k):
            self.t0, self.t1, self.y0, self.y1 = t0, t1, y0, y1 + 0 * jnp.sum(k @ k.T)

        def evaluate(self, t0, t1=None, left=True):
            y = super().evaluate(t0, t1, left)
            return y / jnp.linalg.norm(y)

    class OnSphere(diffrax.Tsit5):
        interpolation_cls = Normalised  # pyright: ignore

    for solver in (OnSphere(), diffrax.Kvaerno5(), diffrax.ImplicitEuler()):
        assert interpolation_of(solver) == solver.interpolation_cls
