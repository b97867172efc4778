"""The parts of the joint solve by themselves."""

import functools as ft
from typing import Any

import diffrax
import diffrax_deer._scan.auto
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffrax import ODETerm
from diffrax_deer import (
    AssociativeScan,
    AutoScan,
    DEER,
    DeerAdjoint,
    DeerSolver,
    KernelScan,
    SequentialScan,
)
from diffrax_deer._batch import one_by_one_on_cpus
from diffrax_deer._interpolation import uniform_grid
from diffrax_deer._method._linearise import matrix_exponential, matrix_polynomial
from diffrax_deer._step import is_ode, OneStepMap
from diffrax_deer._window import Window

from .helpers import explicit_solvers, max_error, problem, solver_id


def _random_recurrence(length, size, reverse, is_diagonal=False):
    rng = np.random.default_rng(0)
    A = rng.normal(size=(length, size, size)) / size**0.5
    if is_diagonal:
        A *= np.eye(size)
    b = rng.normal(size=(length, size))
    x = np.zeros(size)
    expected = np.zeros((length, size))
    for n in reversed(range(length)) if reverse else range(length):
        x = A[n] @ x + b[n]
        expected[n] = x
    if is_diagonal:
        A = np.diagonal(A, axis1=1, axis2=2)
    return jnp.array(A), jnp.array(b), expected


scans = (
    AssociativeScan(),
    AutoScan(),
    KernelScan(interpret=True),
    SequentialScan(),
)


@pytest.mark.parametrize("scan", scans, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("length", (1, 2, 7))
@pytest.mark.parametrize("reverse", (False, True))
def test_scan(scan, length, reverse):
    A, b, expected = _random_recurrence(length, 3, reverse)
    assert max_error(scan(A, b, reverse=reverse), expected) < 1e-13


@pytest.mark.parametrize("is_diagonal", (False, True))
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("length, size", ((64, 1), (65, 16), (70, 17), (3000, 2)))
def test_kernel_scan(length, size, reverse, is_diagonal):
    # Of none, one and two levels of chunks, the last of which are not full.
    A, b, expected = _random_recurrence(length, size, reverse, is_diagonal)
    scan = KernelScan(interpret=True)
    assert max_error(scan(A, b, reverse=reverse), expected) < 1e-12
    batch = jax.vmap(lambda b: scan(A, b, reverse=reverse))(jnp.stack([b, -2 * b]))
    assert max_error(batch, jnp.stack([expected, -2 * expected])) < 1e-12


@pytest.mark.parametrize("is_diagonal", (False, True))
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize(
    "size, dtype", ((1, jnp.float32), (3, jnp.float64), (16, jnp.float32))
)
@pytest.mark.skipif(
    jax.default_backend() != "gpu" and jax.__version_info__ >= (0, 11),
    reason="JAX has to know which GPU to lower for",
)
def test_kernel_scan_compiles_for_gpus(dtype, size, reverse, is_diagonal):
    # As far as that is possible without one: down to Triton.
    A = jnp.zeros((5000, size) if is_diagonal else (5000, size, size), dtype)
    fn = lambda A, b: KernelScan()(A, b, reverse=reverse)
    for fn, A in ((fn, A), (jax.vmap(fn), A[None])):
        b = jnp.zeros(A.shape if is_diagonal else A.shape[:-1], dtype)
        hlo = jax.jit(fn).trace(A, b).lower(lowering_platforms=("cuda",)).as_text()
        # 5000 terms are 313 chunks, and these are 20.
        assert hlo.count("xla.gpu.triton") == 5


def test_kernel_scan_solves_windows():
    term = ODETerm(lambda t, y, args: jnp.stack([y[1], -args * jnp.sin(y[0])]))

    @ft.partial(jax.jit, static_argnames="scan")
    def value_and_grad(args, scan):
        def loss(args):
            y0 = jnp.array([1.0, 0.0])
            solver = DeerSolver(diffrax.Tsit5(), 100, scan=scan)
            sol = diffrax.diffeqsolve(
                *(term, solver, 0, 5, 5, y0, args),
                max_steps=1,
                adjoint=DeerAdjoint(),
            )
            return jnp.sum(jnp.asarray(sol.ys))

        return jax.value_and_grad(loss)(args)

    actual = value_and_grad(2.0, KernelScan(interpret=True))
    assert max_error(actual, value_and_grad(2.0, SequentialScan())) < 1e-9


@pytest.mark.parametrize("scan", scans, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
def test_scan_keeps_zeros_despite_overflow(scan, dtype):
    # The products of these matrices overflow. Up to the front there is nothing they
    # could be multiplied with.
    A = jnp.full((100, 2, 2), 1e20, dtype)
    b = jnp.zeros((100, 2), dtype).at[60:].set(1)
    x = scan(A, b)
    assert jnp.all(x[:60] == 0)
    assert jnp.all(x[60] == 1)


def test_scan_by_platform():
    A, b = jnp.zeros((16, 2, 2)), jnp.zeros((16, 2))

    def hlo(platform):
        traced = jax.jit(lambda A, b: AutoScan()(A, b)).trace(A, b)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "while" in hlo("cpu")
    assert "while" not in hlo("cuda")
    assert "while" not in hlo("tpu")


@pytest.mark.skipif(
    jax.default_backend() != "gpu" and jax.__version_info__ >= (0, 11),
    reason="JAX has to know which GPU to lower for",
)
def test_kernels_are_for_gpus(monkeypatch):
    monkeypatch.setattr(diffrax_deer._scan.auto, "has_gpu", lambda: True)

    def has_kernels(platform, size, dtype=jnp.float32):
        A, b = jnp.zeros((16, size, size), dtype), jnp.zeros((16, size), dtype)
        traced = jax.jit(lambda A, b: AutoScan()(A, b)).trace(A, b)
        return "triton" in traced.lower(lowering_platforms=(platform,)).as_text()

    assert has_kernels("cuda", 16)
    assert not has_kernels("cuda", 17)
    assert not has_kernels("cuda", 2, jnp.float16)
    assert not has_kernels("cpu", 2)
    assert not has_kernels("tpu", 2)


def test_batches_by_platform():
    # Halves `x` until it is below `limit`, and says how often.
    def fn(x__limit):
        x, limit = x__limit
        cond = lambda carry: carry[0] > limit
        body = lambda carry: (carry[0] / 2, carry[1] + 1)
        x, number = jax.lax.while_loop(cond, body, (x, 0))
        return dict(x=x, number=number, name="fn")

    def solve(x, limit):
        out: Any = one_by_one_on_cpus(fn, (x, limit))
        assert out.pop("name") == "fn"
        return out

    x, limit = jnp.array([1.0, 8.0, 100.0]), jnp.array([1.0, 3.0])
    both = jax.vmap(jax.vmap(solve, in_axes=(0, None)), in_axes=(None, 0))
    out = jax.jit(both)(x, limit)
    assert out["number"].tolist() == [[0, 3, 7], [0, 2, 6]]
    assert out["x"].tolist() == [[1, 1, 100 / 2**7], [1, 2, 100 / 2**6]]
    eager = jax.vmap(solve, in_axes=(0, None))(x, 1.0)
    assert eager["number"].tolist() == [0, 3, 7]

    def num_loops(platform):
        traced = jax.jit(jax.vmap(solve, in_axes=(0, None))).trace(x, 1.0)
        hlo = traced.lower(lowering_platforms=(platform,)).as_text()
        return hlo.count("stablehlo.while")

    # Over the elements, and for each of them; and one for all.
    assert num_loops("cpu") == 2
    assert num_loops("cuda") == num_loops("tpu") == 1


@pytest.mark.parametrize("scale", (0.0, 1e-3, 1.0, 30.0))
def test_matrix_exponential(scale):
    rng = np.random.default_rng(0)
    X = jnp.array(scale * rng.normal(size=(5, 4, 4)))
    exact = jax.vmap(jax.scipy.linalg.expm)(X)
    assert max_error(matrix_exponential(X), exact) < 2e-2


@pytest.mark.parametrize("degree", range(1, 14))
def test_matrix_polynomial(degree):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(5, 3, 3))
    coefficients = rng.normal(size=degree + 1)
    expected = sum(
        c * np.stack([np.linalg.matrix_power(x, i) for x in X])
        for i, c in enumerate(coefficients)
    )
    actual = matrix_polynomial(tuple(coefficients.tolist()), jnp.array(X))
    assert max_error(actual, expected) < 1e-13


@pytest.mark.parametrize("jacobian", ("linear_ode", "exact"))
@pytest.mark.parametrize(
    "solver",
    (*explicit_solvers, diffrax.HalfSolver(diffrax.Heun())),
    ids=solver_id,
)
def test_linearisation(jacobian, solver):
    # Of a linear equation: exact.
    J = jnp.array([[-3.0, 8.0], [-5.0, -2.0]])
    term = ODETerm(lambda t, y, args: J @ y)
    ts = jnp.linspace(0, 2, 6)
    y0 = jnp.array([1.0, 2.0])
    window = Window(step=OneStepMap(solver, term, y0, None), ts=ts, y0=y0)
    ys = jnp.ones((5, 2))
    A = DEER(jacobian).linearise(window, ys)
    exact = window.jacobian(ys)
    assert max_error(A[1:], exact[1:]) < 1e-12


def test_matrix_exponential_of_stiff_matrices():
    out = matrix_exponential(jnp.array([[[-1e6]], [[0.0]]]))
    assert abs(out[0, 0, 0]) < 1e-6
    assert abs(out[1, 0, 0] - 1) < 1e-6
    assert jnp.isnan(matrix_exponential(jnp.array([[[jnp.nan]]]))).all()


@pytest.mark.parametrize("solver", explicit_solvers, ids=solver_id)
def test_fast_path(solver):
    # To the last bits of Diffrax's own step.
    term, y0, args = problem()
    step = OneStepMap(solver, term, y0, args)
    ours = step.substep(jnp.array(0.3), jnp.array(0.4), y0)
    state = solver.init(term, 0.3, 0.4, y0, args)
    y1, y_error, dense_info, _, _ = solver.step(term, 0.3, 0.4, y0, args, state, False)
    assert max_error(ours.y1, y1) < 1e-15
    if y_error is None:
        assert ours.y_error is None
    else:
        assert jnp.max(jnp.abs(ours.y_error - y_error)) < 1e-16
    assert max_error(ours.dense_info, dense_info) < 1e-15


def test_is_ode():
    term = ODETerm(lambda t, y, args: y)
    control = diffrax.ControlTerm(lambda t, y, args: y, lambda t0, t1: t1 - t0)
    assert is_ode(term)
    assert is_ode(diffrax.MultiTerm(term, term))
    assert not is_ode(control)
    assert not is_ode(diffrax.MultiTerm(term, control))
    assert not is_ode((term, term))


def test_grid():
    ts = uniform_grid(jnp.float32(0.1), jnp.float32(0.7), 49)
    assert ts.dtype == jnp.float32
    assert ts[0] == jnp.float32(0.1)
    assert ts[-1] == jnp.float32(0.7)
    assert jnp.all(jnp.diff(ts) > 0)
