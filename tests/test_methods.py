"""All methods lead to the same solution, and to the same derivatives."""

import dataclasses
import functools as ft
from typing import Any, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffrax import ODETerm, RESULTS
from diffrax_deer import (
    AssociativeScan,
    ConstantGuess,
    DEER,
    DeerAdjoint,
    DeerSolver,
    ELK,
    GaussLegendre,
    Jacobi,
    Picard,
    QuasiDEER,
    QuasiELK,
    SequentialScan,
)
from diffrax_deer._linear_algebra import matmul, matvec
from diffrax_deer._method.damping import _gains

from .helpers import deer, diffeqsolve, lorenz, max_error, sequential, van_der_pol


tsit5 = diffrax.Tsit5()
methods = {
    "DEER": DEER(),
    "QuasiDEER": QuasiDEER(),
    "Hutchinson": QuasiDEER(samples=2),
    "ELK": ELK(),
    "QuasiELK": QuasiELK(),
    "damped ELK": ELK(0.01),
    "damped QuasiELK": QuasiELK(jnp.array(0.01)),
    "Picard": Picard(),
    "Jacobi": Jacobi(),
}


def lotka_volterra(t, y, args):
    return jnp.stack([y[0] * (1.5 - y[1]), y[1] * (y[0] - 3)])


def two_body(t, y, args):
    r = y[:2] - y[2:4]
    a = r / jnp.sum(r**2) ** 1.5
    return jnp.concatenate([y[4:], -a, a])


_weight = np.random.default_rng(0).normal(size=(64, 64)) / 8


def neural(t, y, args):
    return jnp.tanh(_weight @ y) - 0.1 * y


# The vector field, the initial value, and the length and the number of the substeps. Of
# these there are 64 in a window.
problems = {
    "Lotka-Volterra": (lotka_volterra, np.array([1.0, 1.0]), 10 / 256, 256),
    "van der Pol": (
        lambda t, y, args: van_der_pol(t, y, 2.0),
        np.array([2.0, 0.0]),
        10 / 512,
        512,
    ),
    "two bodies": (
        two_body,
        np.array([0.5, 0.0, -0.5, 0.0, 0.0, 0.7, 0.0, -0.7]),
        10 / 128,
        128,
    ),
    "Lorenz": (lorenz, np.array([1.0, 1.0, 1.0]), 2 / 512, 512),
    "neural": (neural, np.linspace(-1, 1, 64), 4 / 64, 64),
}


@ft.cache
def _reference(problem):
    vector_field, y0, dt, steps = problems[problem]
    term, y0 = ODETerm(vector_field), jnp.asarray(y0)
    ts = dt * np.arange(steps + 1)
    return term, y0, ts, sequential(term, diffrax.Tsit5(), ts, y0).ys


# All methods on one problem, and the others with a method for each.
@pytest.mark.parametrize(
    "problem,method",
    (
        *(("two bodies", method) for method in methods),
        ("Lotka-Volterra", "Hutchinson"),
        ("van der Pol", "damped ELK"),
        ("Lorenz", "ELK"),
        ("neural", "DEER"),
        ("neural", "damped QuasiELK"),
    ),
)
def test_same_solution(problem, method):
    term, y0, ts, reference = _reference(problem)
    method = methods[method]
    sol = diffeqsolve(
        term,
        deer(diffrax.Tsit5(), 64, method=method),
        0,
        ts[-1],
        64 * ts[1],
        y0,
        max_steps=16,
    )
    assert max_error(sol.ys, reference) < 1e-8


@pytest.mark.parametrize(
    "method,scan",
    (
        (DEER(), AssociativeScan()),
        (QuasiDEER(), SequentialScan()),
        (ELK(), SequentialScan()),
        (QuasiELK(), AssociativeScan()),
    ),
)
def test_far_from_the_solution(method, scan):
    # In a single window, from a constant guess. The iterates overflow, and would come
    # back one substep at a time.
    term, y0, ts, reference = _reference("van der Pol")

    def solve(max_iters):
        solver = deer(
            *(diffrax.Tsit5(), len(ts) - 1),
            method=method,
            scan=scan,
            max_iters=max_iters,
        )
        return diffeqsolve(
            *(term, solver, 0, ts[-1], ts[-1], y0), max_steps=1, throw=False
        )

    assert max_error(solve(80).ys, reference) < 1e-8
    if method == DEER():
        sol = solve(10)
        assert sol.result != RESULTS.successful
        assert jnp.all(sol.ys == y0)


def _loss(inputs, solver, adjoint):
    y0, a, t1 = inputs
    sol = diffeqsolve(
        ODETerm(lambda t, y, a: a * van_der_pol(t, y, 2.0)),
        solver,
        0,
        t1,
        1.0,
        y0,
        a,
        saveat=diffrax.SaveAt(ts=t1 * jnp.linspace(0.1, 1, 5)),
        max_steps=4,
        adjoint=adjoint,
    )
    return jnp.sum(jnp.sin(sol.ys))


# Of the reference, which is that of all methods, compiled only once.
_grad = eqx.filter_jit(jax.grad(_loss))


@pytest.mark.parametrize(
    "method,adjoint",
    (
        (ELK(), DeerAdjoint()),
        (QuasiDEER(), DeerAdjoint()),
        (QuasiDEER(), diffrax.DirectAdjoint()),
        (QuasiELK(), DeerAdjoint()),
        (Picard(), DeerAdjoint()),
        (Jacobi(), DeerAdjoint()),
    ),
    ids=lambda x: type(x).__name__,
)
def test_same_derivatives(method, adjoint):
    inputs = (jnp.array([2.0, 0.0]), jnp.array(1.1), jnp.array(2.1))
    solver = DeerSolver(diffrax.Tsit5(), 16, method=method, guess=ConstantGuess())
    out = _grad(inputs, solver, adjoint)
    plain = DeerSolver(diffrax.Tsit5(), 16)
    assert max_error(out, _grad(inputs, plain, diffrax.DirectAdjoint())) < 1e-9


def _pendulums(inputs, solver):
    coupling, y0 = inputs

    def vector_field(t, y, args):
        q, p = y
        return p, coupling * (jnp.roll(q, 1) - q) - jnp.sin(q)

    sol = diffeqsolve(
        *(ODETerm(vector_field), solver, 0.0, 6.0, 6.0, y0),
        max_steps=1,
        adjoint=DeerAdjoint(),
    )
    q, p = sol.ys
    return jnp.sum(jnp.sin(q)) + jnp.sum(p), (sol.ys, sol.stats)


_pendulums_value = eqx.filter_jit(_pendulums)
_y0_of_pendulums = (jnp.array([0.1, 1.0, 2.0]), jnp.zeros(3))


@pytest.mark.parametrize(
    "solver,full,blocks",
    (
        (diffrax.Tsit5(), DEER(), QuasiDEER(samples=1, block=2)),
        (diffrax.Tsit5(), ELK(), QuasiELK(block=2)),
        (GaussLegendre(2), DEER(), QuasiDEER(block=2)),
    ),
    ids=("explicit", "damped", "implicit"),
)
def test_blocks(solver, full, blocks):
    def solve(coupling, method):
        deer = DeerSolver(solver, 32, method=method, guess=ConstantGuess())
        inputs = (jnp.array(coupling), _y0_of_pendulums)
        _, (ys, stats) = _pendulums_value(inputs, deer)
        return ys, int(stats["num_iterations"])

    with pytest.raises(ValueError, match=r"block=...\).*divide.* 6 "):
        solve(0.0, dataclasses.replace(blocks, block=4))
    # If the blocks are all there is, then this is the same iteration.
    expected, num_iterations = solve(0.0, full)
    ys, num_block_iterations = solve(0.0, blocks)
    assert max_error(ys, expected) < 1e-9
    if isinstance(full, DEER):
        assert num_block_iterations == num_iterations
    # If not, then the solution is the same.
    assert max_error(solve(0.3, blocks)[0], solve(0.3, full)[0]) < 1e-9


def test_memory_of_diagonal_methods():
    size, substeps = 256, 1024
    weight = np.random.default_rng(0).normal(size=(size, size)) / 16

    def memory(method, grad):
        def solve(y0):
            sol = diffeqsolve(
                ODETerm(lambda t, y, args: jnp.tanh(weight @ y) - y),
                DeerSolver(tsit5, substeps, method=method, guess=ConstantGuess()),
                0,
                1,
                1,
                y0,
                adjoint=DeerAdjoint(),
                max_steps=1,
            )
            return jnp.sum(sol.ys)

        fn = jax.grad(solve) if grad else solve
        y0 = jax.ShapeDtypeStruct((size,), jnp.float32)
        compiled: Any = jax.jit(fn).lower(y0).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for grad in (False, True):
        assert memory(QuasiDEER(), grad) < memory(DEER(), grad) / 20


@pytest.mark.parametrize("damping", (0.0, 0.1, 10.0))
@pytest.mark.parametrize("size", (1, 3))
def test_damping(size, damping, monkeypatch):
    rng = np.random.default_rng(0)
    substeps = 21
    A = rng.normal(size=(substeps, size, size))
    diagonal = rng.normal(size=(substeps, size))
    b = rng.normal(size=(substeps, size))

    def reference(A):
        # The textbook's Kalman filter.
        x, P, xs = np.zeros(size), np.zeros((size, size)), []
        for n in range(substeps):
            x, P = A[n] @ x + b[n], A[n] @ P @ A[n].T + np.eye(size)
            if damping > 0:
                gain = P @ np.linalg.inv(P + np.eye(size) / damping)
                x, P = x - gain @ x, P - gain @ P
            xs.append(x)
        return np.stack(xs)

    full = np.stack([np.diag(x) for x in diagonal])
    b, damping = jnp.asarray(b), jnp.asarray(damping)
    for platform in ("cpu", "other"):
        monkeypatch.setattr(
            *(jax.lax, "platform_dependent"),
            lambda *args, cpu, default: (cpu if platform == "cpu" else default)(*args),
        )

        @jax.jit
        def damped(A):
            gains = _gains(A, b, damping)
            product = matvec if A.ndim == b.ndim else matmul
            return SequentialScan()(product(gains, A), matvec(gains, b))

        assert max_error(damped(jnp.asarray(A)), reference(A)) < 1e-12
        assert max_error(damped(jnp.asarray(diagonal)), reference(full)) < 1e-12


@pytest.mark.parametrize("scan", (SequentialScan(), AssociativeScan()))
@pytest.mark.parametrize("reverse", (False, True))
def test_diagonal_scans(scan, reverse):
    rng = np.random.default_rng(0)
    diagonal, b = rng.normal(size=(2, 21, 3))
    full = np.stack([np.diag(x) for x in diagonal])
    out = scan(jnp.asarray(diagonal), jnp.asarray(b), reverse=reverse)
    expected = scan(jnp.asarray(full), jnp.asarray(b), reverse=reverse)
    assert max_error(out, expected) < 1e-12


@pytest.mark.parametrize(
    "make,error,message",
    (
        (lambda: ELK(-1), ValueError, r"ELK\(damping=...\).*negative"),
        (lambda: ELK(float("nan")), ValueError, "damping"),
        (lambda: QuasiELK(cast(Any, "much")), TypeError, r"QuasiELK\(damping=...\)"),
        (lambda: QuasiDEER(samples=0), ValueError, r"QuasiDEER\(samples=...\)"),
        (lambda: QuasiDEER(block=0), ValueError, r"QuasiDEER\(block=...\)"),
        (
            lambda: QuasiELK(samples=cast(Any, 1.5)),
            TypeError,
            r"QuasiELK\(samples=...\)",
        ),
    ),
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("residual,expected", ((1e-8, True), (1.0, False)))
def test_damped_corrections_tell_nothing(residual, expected):
    # They are small because of the damping, and not because the solution is near.
    ones = jnp.ones((5, 2))
    for method, A in ((ELK(), jnp.stack([0.5 * jnp.eye(2)] * 5)), (QuasiELK(), ones)):
        _, is_telling = method.correct(SequentialScan(), A, residual * ones, ones)
        assert is_telling == expected
