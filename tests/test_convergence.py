"""When an iteration ends, and what of it begins again."""

import diffrax
import jax.numpy as jnp
import pytest
from diffrax import ODETerm
from diffrax_deer._iterate import Convergence
from diffrax_deer._iterate.restart import first_of, restart, too_large
from diffrax_deer._window import Iterate

from .helpers import discretised


inf, nan = jnp.inf, jnp.nan


@pytest.mark.parametrize(
    "excess,drift,expected",
    (
        (0.0, 0.0, True),
        (0.9, 0.9, True),
        # Some substep misses the next value by more than that.
        (1.1, 0.1, False),
        # All of them miss it by little, and in the same direction.
        (0.1, 3.0, False),
        (inf, 0.0, False),
        (nan, 0.0, False),
        (0.0, nan, False),
    ),
)
def test_exact(excess, drift, expected):
    convergence = Convergence(jnp.array(1.0))
    assert convergence.is_exact(jnp.array(excess), jnp.array(drift)) == expected


@pytest.mark.parametrize(
    "last,change,is_telling,close,standstill",
    (
        # The rate is not known yet.
        (0.0, 1e-3, True, False, False),
        (0.0, 0.0, True, False, False),
        # What is left is this times the rate.
        (1e4, 1.0, True, True, False),
        (1e2, 1.0, True, True, False),
        (1e2, 20.0, True, False, False),
        # A very good rate is not believed.
        (1e12, 1e3, True, False, False),
        # Slowly, but it converges.
        (2e-3, 0.9e-3, True, True, False),
        (2.0, 0.9, True, False, False),
        # Not at all: smaller than the tolerance, or than rounding errors.
        (1.0, 0.6, True, False, True),
        (1e-8, 1e-8, True, False, True),
        (1.0, 1e5, True, False, True),
        # Damped.
        (1e4, 1.0, False, False, False),
        (1e4, 0.0, False, False, False),
        (1.0, inf, True, False, True),
        (1.0, nan, True, False, False),
    ),
)
def test_changes(last, change, is_telling, close, standstill):
    convergence = Convergence(jnp.array(last))
    change = jnp.array(change)
    assert convergence.is_close(change, jnp.array(is_telling)) == close
    assert convergence.is_standstill(change) == standstill


def _iterate(ys, ks=None):
    ys = jnp.asarray(ys, float)
    ks = jnp.zeros((len(ys), 1, 1, ys.shape[1])) if ks is None else ks
    return Iterate(ys, ks)


def test_too_large():
    y0 = jnp.array([1.0, 0.01])
    new = _iterate([[1.0, 0.0], [2.0, 0.0], [30.0, 0.0], [2.0, 0.0]])
    # Known is what hardly changes: the first two, of which the second one is twice as
    # large as the first.
    delta = _iterate([[0.0, 0.0], [0.05, 0.0], [28.0, 0.0], [7.9, 0.0]])
    assert too_large(y0, new, delta).tolist() == [False, False, True, False]
    # A small component may grow to the size of the large ones, but not much beyond.
    delta = _iterate([[0.0, 0.0], [0.0, 0.09], [2.0, 0.9], [0.0, 0.7]])
    assert too_large(y0, new, delta).tolist() == [False, False, True, False]
    # Stages count as well.
    ks = jnp.zeros((4, 1, 1, 2)).at[3, 0, 0, 0].set(-200)
    delta = _iterate(jnp.zeros((4, 2)), ks)
    assert too_large(y0, new, delta).tolist() == [False, False, False, True]


@pytest.mark.parametrize("first", (0, 2, 4))
def test_restart(first):
    y0, ts = jnp.array([7.0]), jnp.linspace(0, 1, 5)
    term = ODETerm(lambda t, y, args: -y)
    solver = diffrax.Heun()
    window = discretised(solver, term, None, ts, y0).window
    at = Iterate(jnp.arange(4.0)[:, None], jnp.ones((4, 1, 2, 1)))
    out = restart(window, at, jnp.array(first))
    expected = {0: [7, 7, 7, 7], 2: [0, 1, 1, 1], 4: [0, 1, 2, 3]}
    assert out.ys[:, 0].tolist() == expected[first]
    kept = jnp.arange(4) < first
    assert jnp.all(out.ks == kept[:, None, None, None])


def test_first():
    assert first_of(jnp.array([False, True, True])) == 1
    assert first_of(jnp.array([False, False])) == 2
