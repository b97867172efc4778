"""The parts of the joint solve by themselves."""

import functools as ft

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
    DeerAdjoint,
    DeerSolver,
    KernelScan,
    SequentialScan,
)
from diffrax_deer._window import uniform_steps

from .helpers import max_error


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


@pytest.mark.parametrize(
    "length, size, reverse, is_diagonal",
    (
        (64, 1, False, True),
        (64, 1, True, False),
        (65, 16, False, False),
        (65, 16, True, True),
        (70, 17, False, True),
        (70, 17, True, False),
        (3000, 2, False, False),
        (3000, 2, True, True),
    ),
)
def test_kernel_scan(length, size, reverse, is_diagonal):
    # Of none, one and two levels of chunks, the last of which are not full.
    A, b, expected = _random_recurrence(length, size, reverse, is_diagonal)
    scan = KernelScan(interpret=True)
    assert max_error(scan(A, b, reverse=reverse), expected) < 1e-12
    batch = jax.vmap(lambda b: scan(A, b, reverse=reverse))(jnp.stack([b, -2 * b]))
    assert max_error(batch, jnp.stack([expected, -2 * expected])) < 1e-12


@pytest.mark.parametrize("reverse, is_diagonal", ((False, True), (True, False)))
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


def test_grid():
    t0s, t1s = uniform_steps(jnp.float32(0.1), jnp.float32(0.7), 49)
    assert t0s.dtype == t1s.dtype == jnp.float32
    assert t0s[0] == jnp.float32(0.1)
    assert t1s[-1] == jnp.float32(0.7)
    assert jnp.all(t0s[1:] == t1s[:-1])
    assert jnp.all(t0s < t1s)
