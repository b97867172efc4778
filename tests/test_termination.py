"""As many iterations as unknowns always suffice, whatever the vector field."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffrax import ODETerm
from diffrax_deer import (
    AbstractScan,
    ConstantGuess,
    DEER,
    DeerSolver,
    ELK,
    Jacobi,
    Picard,
    QuasiDEER,
    QuasiELK,
    SequentialScan,
)
from hypothesis import example, given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from .helpers import diffeqsolve, lorenz, max_error, SaveAt, sequential


SUBSTEPS = 24
tsit5 = diffrax.Tsit5()


def _vector_field(t, y, args):
    linear, quadratic, cubic, frequency = args
    return (
        linear @ y
        + jnp.einsum("ijk,j,k->i", quadratic, y, y)
        - cubic * y**3
        + jnp.cos(frequency * t)
    )


@eqx.filter_jit
def _solve(method, t1, y0, args):
    solver = DeerSolver(tsit5, SUBSTEPS, method=method, guess=ConstantGuess())
    sol = diffeqsolve(
        *(ODETerm(_vector_field), solver, jnp.zeros_like(t1), t1, t1, y0, args),
        saveat=SaveAt(t1=True, solver_state=True),
        max_steps=1,
        throw=False,
    )
    okay = sol.result == diffrax.RESULTS.successful
    return sol.solver_state.ys, okay, sol.solver_state.num_iterations


@eqx.filter_jit
def _sequential(t1, y0, args):
    term = ODETerm(_vector_field)

    def body(y, t0__t1):
        t0, t1 = t0__t1
        state = tsit5.init(term, t0, t1, y, args)
        y, *_ = tsit5.step(term, t0, t1, y, args, state, False)
        return y, y

    ts = t1 * jnp.linspace(0, 1, SUBSTEPS + 1, dtype=y0.dtype)
    return jax.lax.scan(body, y0, (ts[:-1], ts[1:]))[1]


numbers = st.floats(-1, 1, width=16)
scales = st.sampled_from((0.0, 0.1, 1.0, 10.0))


@st.composite
def problems(draw):
    array = lambda *shape: draw(arrays(np.float64, shape, elements=numbers))
    args = (
        draw(scales) * array(3, 3),
        draw(scales) * array(3, 3, 3),
        draw(st.sampled_from((0.0, 0.1, 1.0))),
        10 * draw(numbers),
    )
    return draw(st.sampled_from((0.1, 1.0, 10.0))), 10 * draw(scales) * array(3), args


# Solved to rounding errors, when one more iteration amplified these by 1e11.
_quadratic = np.zeros((3, 3, 3))
_quadratic[1, 0, 0], _quadratic[2, 0, 1], _quadratic[2, 2, 2] = -5, 0.9375, 5.15625
_linear = 0.025 * np.array([[0, 1, 1], [1, 2, 1], [1, 1, 1]])
solved = (1.0, np.array([0, 0, -0.439453125]), (_linear, _quadratic, 0.0, 0.0))

# Damped to a standstill before a substep to 1e9.
_standstill = (1.0, np.zeros(3), (np.zeros((3, 3)), np.full((3, 3, 3), 0.5), 0.1, 0.0))

methods = (DEER(), QuasiDEER(), ELK(), QuasiELK(), Picard(), Jacobi())


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("method", methods, ids=lambda x: type(x).__name__)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems())
@example(problem=solved)
@example(problem=_standstill)
def test_every_finite_problem(method, dtype, problem):
    t1, y0, args = jax.tree_util.tree_map(lambda x: np.asarray(x, dtype), problem)
    ref = np.asarray(_sequential(t1, y0, args))
    # What a few rounding errors become is as much as can be asked for.
    eps = np.finfo(dtype).eps
    away = np.copysign(4 * eps * np.maximum(np.abs(y0), np.abs(ref[0])), y0)
    nearby = np.asarray(_sequential(t1, y0 + away, args))
    ys, okay, num_iterations = map(np.asarray, _solve(method, t1, y0, args))
    assert 0 < num_iterations <= SUBSTEPS * (tsit5.tableau.num_stages + 1) + 1
    assert np.isfinite(ys).all()
    largest = np.finfo(dtype).max / 100
    if (
        np.isfinite(ref).all()
        and np.isfinite(nearby).all()
        and np.abs(ref).max() < largest
    ):
        assert okay
        # Nothing that comes later must disturb what comes before.
        size = np.maximum.accumulate(np.max(np.abs(ref), axis=-1))
        noise = np.maximum.accumulate(np.max(np.abs(nearby - ref), axis=-1))
        tol = 1e-8 if dtype == np.float64 else 1e-3
        assert np.all(np.max(np.abs(ys - ref), axis=-1) <= tol * size + 300 * noise)
    elif np.isnan(ref).any():
        assert not okay


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("method", (DEER(), ELK()), ids=lambda x: type(x).__name__)
def test_lorenz(method, dtype):
    # In a single window, from a constant guess, so that there is nothing to go by.
    # Undamped, it is far from anything for most of the time.
    term, substeps = ODETerm(lorenz), 512
    y0, t1 = jnp.ones(3, dtype), dtype(2)
    solver = DeerSolver(tsit5, substeps, method=method, guess=ConstantGuess())
    saveat = SaveAt(t1=True, solver_state=True)
    sol = diffeqsolve(term, solver, dtype(0), t1, t1, y0, saveat=saveat, max_steps=1)
    ts = np.linspace(0, 2, substeps + 1, dtype=dtype)
    reference = sequential(term, tsit5, ts, y0).ys
    assert sol.ys.dtype == dtype
    # In single precision, a rounding error grows by a factor of about 10.
    assert max_error(sol.ys, reference) < (1e-4 if dtype == np.float32 else 1e-10)
    assert sol.solver_state.num_iterations <= substeps


class _LowPrecisionScan(AbstractScan):
    def __call__(self, A, b, *, reverse=False):
        cast = lambda x: x.astype(jnp.bfloat16).astype(b.dtype)
        return cast(SequentialScan()(cast(A), cast(b), reverse=reverse))


@pytest.mark.parametrize("substeps", (1, 2, 3, 30))
def test_inexact_scan(substeps):
    # It takes part in the correction only, and so decides nothing but how many
    # iterations there are.
    term = ODETerm(lambda t, y, args: -y)
    guess = ConstantGuess()
    solver = DeerSolver(tsit5, substeps, scan=_LowPrecisionScan(), guess=guess)
    sol = diffeqsolve(term, solver, 0, 1, 1, 1.0, max_steps=1)
    reference = sequential(term, tsit5, np.linspace(0, 1, substeps + 1), 1.0)
    assert max_error(sol.ys, reference.ys) < 1e-9
