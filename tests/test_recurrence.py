"""`deer_scan`, against `jax.lax.scan`."""

import functools as ft
from typing import Any, cast

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from diffrax import RESULTS
from diffrax_deer import (
    AssociativeScan,
    DEER,
    deer_scan,
    deer_scan_solution,
    ELK,
    Jacobi,
    Picard,
    QuasiDEER,
    QuasiELK,
    SequentialScan,
)
from jax.flatten_util import ravel_pytree

from .helpers import max_error, van_der_pol


SIZE = 3


class Tanh(eqx.Module):
    """A vanilla recurrent neural network."""

    weight: jax.Array
    linear: eqx.nn.Linear

    def __init__(self, input_size, hidden_size, *, key):
        self.weight = jr.normal(key, (hidden_size, hidden_size)) / hidden_size**0.5
        self.linear = eqx.nn.Linear(input_size, hidden_size, key=key)

    def __call__(self, x, h):
        return jnp.tanh(self.weight @ h + self.linear(x))


def _problem(cls, length, dtype):
    cell = cls(2, SIZE, key=jr.key(0))
    xs = jr.normal(jr.key(1), (length, 2))
    init = 0.1 * jr.normal(jr.key(2), (SIZE,))
    if cls is eqx.nn.LSTMCell:
        init = (init, -init)
    to_dtype = lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x
    return jtu.tree_map(to_dtype, (cell, init, xs))


def _loss(inputs, scan):
    cell, init, xs = inputs

    def f(h, x):
        h = cell(x, h)
        y = h[0] if isinstance(h, tuple) else h
        return h, dict(y=jnp.sin(y[:2]), x=jnp.sum(x))

    carry, ys = scan(f, init, xs)
    leaves = jtu.tree_leaves((carry, ys))
    return sum(jnp.sum(jnp.cos(leaf)) / leaf.size for leaf in leaves), (carry, ys)


@eqx.filter_jit
def _value_and_grad(inputs, scan):
    return eqx.filter_value_and_grad(_loss, has_aux=True)(inputs, scan)


# The short ones with a single cell.
@pytest.mark.parametrize(
    "cls,length,dtype",
    (
        (eqx.nn.GRUCell, 1, jnp.float64),
        (eqx.nn.GRUCell, 2, jnp.float32),
        (eqx.nn.GRUCell, 17984, jnp.float32),
        (eqx.nn.GRUCell, 17984, jnp.float64),
        (eqx.nn.LSTMCell, 1000, jnp.float64),
        (eqx.nn.LSTMCell, 17984, jnp.float32),
        (Tanh, 1000, jnp.float32),
        (Tanh, 17984, jnp.float64),
    ),
)
def test_cells(cls, length, dtype):
    inputs = _problem(cls, length, dtype)
    (_, out), grad = _value_and_grad(inputs, deer_scan)
    # In double precision, so that its own rounding errors do not count.
    inputs = _problem(cls, length, jnp.float64)
    if dtype == jnp.float32:
        inputs = jtu.tree_map(
            lambda x, y: jnp.asarray(x, jnp.float64) if eqx.is_inexact_array(x) else y,
            _problem(cls, length, dtype),
            inputs,
        )
    (_, expected_out), expected_grad = _value_and_grad(inputs, lax.scan)
    tol = 1e-4 if dtype == jnp.float32 else 1e-9
    arrays = lambda x: eqx.filter(x, eqx.is_inexact_array)
    assert {x.dtype for x in jtu.tree_leaves(arrays((out, grad)))} == {jnp.dtype(dtype)}
    assert max_error(out, expected_out) < tol
    for part, expected_part in zip(grad, expected_grad):
        part, expected_part = (
            ravel_pytree(arrays(x))[0] for x in (part, expected_part)
        )
        assert max_error(part, expected_part) < tol


methods = (
    QuasiDEER(),
    QuasiDEER(samples=4),
    ELK(),
    QuasiELK(0.01),
    Picard(),
    Jacobi(),
    DEER(),
)


@pytest.mark.parametrize("method", methods, ids=lambda x: type(x).__name__)
def test_methods(method):
    inputs = _problem(eqx.nn.GRUCell, 100, jnp.float64)
    fn = ft.partial(deer_scan, method=method, reverse=True)
    (loss, out), grad = _value_and_grad(inputs, fn)
    reference = ft.partial(lax.scan, reverse=True)
    (expected, expected_out), expected_grad = _value_and_grad(inputs, reference)
    assert max_error((loss, out), (expected, expected_out)) < 1e-9
    arrays = lambda x: ravel_pytree(eqx.filter(x, eqx.is_inexact_array))[0]
    assert max_error(arrays(grad), arrays(expected_grad)) < 1e-9


@pytest.mark.parametrize("scan", (SequentialScan(), AssociativeScan()))
def test_higher_derivatives_and_batches(scan):
    def fn(scan):
        def fn(a, init, xs):
            f = lambda y, x: (jnp.sin(a * y + x), a * y)
            carry, ys = scan(f, init, xs)
            return carry + jnp.sum(ys**2)

        hessian = jax.hessian(fn, argnums=(0, 1, 2))
        return jax.jit(jax.vmap(hessian, in_axes=(0, None, 0)))

    args = jnp.array([0.5, 1.2]), 0.3, jr.normal(jr.key(0), (2, 10))
    assert max_error(
        fn(ft.partial(deer_scan, scan=scan))(*args), fn(lax.scan)(*args)
    ) < (1e-9)


# What the documentation of JAX shows, and users do.


def _cumsum(carry, x):
    return carry + x, carry + x


def _fibonacci(carry, _):
    a, b = carry
    return (b, a + b), b


def _counter(carry, x):
    count, total = carry
    return (count + 1, total + x * count), dict(mean=total / (count + 1), count=count)


def _random(carry, x):
    key, position = carry
    key, subkey = jr.split(key)
    return (key, 0.9 * position + jr.normal(subkey)), position * x


# Carries that do not depend on the ones before, as far as derivatives know.


def _delay(carry, x):
    return x, carry * x


def _sign(carry, x):
    return x * jnp.sign(carry), carry


@pytest.mark.parametrize("f", (_delay, _sign, lambda c, x: (None, x**2)))
@pytest.mark.parametrize("derivative", (jax.grad, jax.jacfwd))
def test_no_memory(f, derivative):
    xs = jnp.linspace(-1.0, 1.0, 8)
    init = jnp.array(0.5) if f in (_delay, _sign) else None
    loss = lambda scan: lambda xs: jnp.sum(scan(f, init, xs)[1] ** 2)
    actual = derivative(loss(deer_scan))(xs)
    assert max_error(actual, derivative(loss(lax.scan))(xs)) < 1e-12


@pytest.mark.parametrize(
    "length,reverse", ((0, False), (1, True), (5, False), (5, True))
)
@pytest.mark.parametrize(
    "f,init,make_xs",
    (
        (_cumsum, 0.0, lambda n: jnp.arange(n, dtype=float)),
        (_cumsum, 0, jnp.arange),
        (_cumsum, jnp.zeros((2, 3)), lambda n: np.ones((n, 2, 3))),
        (_cumsum, jnp.zeros((0,)), lambda n: jnp.ones((n, 0))),
        (_fibonacci, (jnp.array(0.0), jnp.array(1.0)), lambda n: None),
        (_fibonacci, (jnp.array(0), jnp.array(1)), lambda n: None),
        (_counter, (0, 1.0), lambda n: jnp.linspace(0, 1, n)),
        (_random, (jr.key(0), 1.0), lambda n: jnp.linspace(0, 1, n)),
        (lambda c, x: (None, x), None, lambda n: jnp.arange(n)),
        (lambda c, x: (c, None), dict(a=1.0, b=()), lambda n: jnp.arange(n)),
        (jax.jit(_counter), (0, 1.0), lambda n: jnp.linspace(0, 1, n)),
    ),
)
def test_same_as_scan(f, init, make_xs, length, reverse):
    actual = deer_scan(f, init, make_xs(length), length, reverse)
    expected = lax.scan(f, init, make_xs(length), length, reverse)
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    data = lambda x: jr.key_data(x) if is_key(x) else x
    # JAX hands back Python numbers that it has got no use for.
    actual, expected = jtu.tree_map(jnp.asarray, (actual, expected))
    actual, expected = jtu.tree_map(data, (actual, expected))
    assert jtu.tree_structure(actual) == jtu.tree_structure(expected)
    assert jtu.tree_map(lambda x: x.dtype, actual) == jtu.tree_map(
        lambda x: x.dtype, expected
    )
    assert max_error(actual, expected) < 1e-12


def test_guess():
    cell, init, xs = _problem(eqx.nn.GRUCell, 200, jnp.float64)
    f = lambda h, x: (cell(x, h), None)

    @jax.jit
    def solve(xs, guess):
        return deer_scan_solution(f, init, xs, reverse=True, guess=guess)

    cold = solve(xs, None)
    warm = solve(xs, cold.carries)
    assert cold.result == warm.result == RESULTS.successful
    assert warm.num_iterations <= 2 < cold.num_iterations
    assert max_error(warm.carries, cold.carries) < 1e-9
    assert jnp.array_equal(warm.carries[0], warm.carry)
    expected = lax.scan(lambda h, x: (cell(x, h),) * 2, init, xs, reverse=True)[1]
    assert max_error(warm.carries, expected) < 1e-9


def test_half_precision():
    # No further from the truth than what is as imprecise, one element after the other.
    xs = jr.normal(jr.key(0), (1000,))

    def run(scan, dtype):
        f = lambda h, x: (jnp.tanh(0.9 * h + 0.5 * x),) * 2
        _, ys = scan(f, jnp.zeros((), dtype), xs.astype(dtype))
        assert ys.dtype == dtype
        return ys

    exact = run(lax.scan, jnp.float64)
    error = lambda scan: max_error(run(scan, jnp.bfloat16), exact)
    assert error(deer_scan) < 2 * error(lax.scan)


@pytest.mark.parametrize("method", (DEER(), QuasiDEER(), QuasiELK()))
def test_long_memory(method):
    # Every element adds something that it finds as a difference of much larger values.
    # The rounding errors of these are all that is left after a few iterations.
    def f(h, x):
        h = x + 0.999 * (h - x)
        return h, h

    xs = jr.normal(jr.key(0), (3000,), jnp.float32)
    init = jnp.zeros((), jnp.float32)
    solution = deer_scan_solution(f, init, xs, method=method)
    expected = lax.scan(f, init.astype(jnp.float64), xs.astype(jnp.float64))[1]
    assert solution.result == RESULTS.successful
    assert solution.num_iterations < 30
    assert max_error(solution.ys, expected) < 1e-4


_activations = (
    jnp.tanh,
    jnp.sin,
    lambda x: jnp.tanh(8 * x),
    lambda x: jnp.clip(x, -2, 2),
    lambda x: jnp.minimum(jnp.abs(x), 2) - 0.5,
)


@ft.partial(jax.jit, static_argnames=("activation", "method"))
def _leaky(activation, method, params, xs):
    weight, memory = params

    def f(h, x):
        new = activation(weight @ h + x)
        h = new + memory * (h - new)
        return h, h

    init = jnp.zeros(len(weight), xs.dtype)
    solution = deer_scan_solution(f, init, xs, method=method)
    return solution.ys, solution.result, lax.scan(f, init, xs)[1]


@pytest.mark.parametrize("method", (DEER(), QuasiDEER()))
@pytest.mark.parametrize("activation", _activations)
def test_random_recurrences(activation, method):
    # What rounding errors look like is only ever guessed at. Nothing that is far from
    # the solution may be mistaken for them, be it steep, or with kinks.
    for seed in range(20):
        keys = jr.split(jr.key(seed), 4)
        gain = 2 ** jr.uniform(keys[0], minval=-2, maxval=1.3)
        amplitude = 10 ** jr.uniform(keys[1], minval=-3, maxval=1)
        params = gain * jr.normal(keys[2], (2, 2)), jnp.array(1 - 0.1 ** (seed % 4))
        inputs = params, amplitude * jr.normal(keys[3], (100, 2))
        single, double = (
            jtu.tree_map(lambda x: x.astype(jnp.float32).astype(dtype), inputs)
            for dtype in (jnp.float32, jnp.float64)
        )
        ys, result, sequential = _leaky(activation, method, *single)
        *_, expected = _leaky(activation, method, *double)
        assert result == RESULTS.successful
        noise = max_error(sequential, expected)
        assert max_error(ys, expected) < 1e-4 + 20 * noise


@pytest.mark.parametrize("method", (DEER(), Jacobi()))
def test_rounding_errors_are_not_the_end_of_what_is_not_finite(method):
    # Until a rounding error has been removed, there are elements that have no value.
    limits = jnp.full(40, jnp.inf).at[jnp.array([10, 20, 30])].set(1.0)

    def f(y, limit):
        y = jnp.where(y > limit, jnp.nan, y)
        return y, y

    guess = jnp.full(40, jnp.nextafter(1.0, 2.0))
    solution = deer_scan_solution(f, 1.0, limits, guess=guess, method=method)
    assert solution.result == RESULTS.successful
    assert max_error(solution.ys, jnp.ones(40)) < 1e-15


@pytest.mark.parametrize("tol", (1e-2, 1e-6))
def test_loose_tolerances(tol):
    # Of so small steps, even those from the guess hardly miss the next value.
    def f(y, _):
        y = y + 1e-3 * van_der_pol(None, y, 5.0)
        return y, y

    init = jnp.array([2.0, 0.0])
    solution = deer_scan_solution(f, init, None, 4000, rtol=tol, atol=tol)
    assert solution.num_iterations < 10
    assert max_error(solution.ys, lax.scan(f, init, None, 4000)[1]) < tol


def test_curvature_is_not_noise():
    solution = deer_scan_solution(
        _logistic, 0.3, None, 200, method=Jacobi(), rtol=1e-3, atol=1e-3
    )
    starts = jnp.append(0.3, solution.carries[:-1])
    assert max_error(solution.carries, _logistic(starts, None)[0]) < 0.03


def test_named_axis():
    # The elements of such a batch depend on each other.
    def solve(scan, xs):
        f = lambda y, x: (0.5 * lax.pmean(y, "i") + 0.1 * jnp.sin(y) + x, None)
        return jax.vmap(lambda x: scan(f, 0.0, x)[0], axis_name="i")(xs)

    xs = jr.normal(jr.key(0), (3, 50))
    assert max_error(solve(deer_scan, xs), solve(lax.scan, xs)) < 1e-9


def _logistic(y, x):
    return 4 * y * (1 - y), None


def test_no_convergence():
    # A chaotic map, over many times in which it can be predicted.
    fn = lambda max_iters: deer_scan_solution(
        _logistic, 0.3, None, 200, method=Jacobi(), max_iters=max_iters
    )
    failed = fn(10)
    assert failed.result == RESULTS.nonlinear_max_steps_reached
    assert failed.carry == 0.3
    assert failed.num_iterations == 10
    assert fn(None).result == RESULTS.successful
    with pytest.raises(Exception, match="has not converged within `max_iters`"):
        deer_scan(_logistic, 0.3, None, 200, method=Jacobi(), max_iters=10)
    blown_up = deer_scan_solution(lambda y, x: (jnp.exp(y), None), 1.0, None, 10)
    assert blown_up.result == RESULTS.nonfinite


def test_memory():
    # That of the setting in the paper on quasi-DEER, but with a larger state.
    size, length = 256, 17984
    cell = eqx.nn.GRUCell(6, size, key=jr.key(0))

    def loss(cell, xs):
        f = lambda h, x: (cell(x, h), None)
        carry, _ = deer_scan(f, jnp.zeros(size, jnp.float32), xs, method=QuasiDEER())
        return jnp.sum(carry**2)

    cell = jtu.tree_map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32),
        eqx.filter(cell, eqx.is_array),
    )
    static = eqx.filter(
        eqx.nn.GRUCell(6, size, key=jr.key(0)), eqx.is_array, inverse=True
    )
    fn = jax.value_and_grad(lambda cell, xs: loss(eqx.combine(cell, static), xs))
    xs = jax.ShapeDtypeStruct((length, 6), jnp.float32)
    compiled: Any = jax.jit(fn).lower(cell, xs).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 2**30


@pytest.mark.parametrize(
    "args,error",
    (
        ((_cumsum, 0.0, (jnp.ones(3), jnp.ones(4))), ValueError),
        ((_cumsum, 0.0, jnp.ones(3), 4), ValueError),
        ((_cumsum, 0.0, None), ValueError),
        ((_cumsum, 0.0, 1.0), ValueError),
        ((lambda c, x: ((c, c), x), 0.0, jnp.ones(3)), TypeError),
        ((lambda c, x: (jnp.ones(2), x), 0.0, jnp.ones(3)), TypeError),
        ((lambda c, x: c, 0.0, jnp.ones(3)), TypeError),
    ),
    ids=("lengths", "length", "no-length", "scalar", "structure", "shape", "no-pair"),
)
def test_what_scan_refuses(args, error):
    with pytest.raises(error) as expected:
        lax.scan(*args)
    with pytest.raises(error) as actual:
        deer_scan(*args)
    first_line = lambda e: str(e.value).splitlines()[0]
    assert first_line(actual) == first_line(expected)


@pytest.mark.parametrize(
    "kwargs,error,message",
    (
        (dict(method="DEER"), TypeError, "method"),
        (dict(scan=SequentialScan), TypeError, "scan"),
        (dict(rtol=-1.0), ValueError, "rtol"),
        (dict(atol="x"), TypeError, "atol"),
        (dict(max_iters=0), ValueError, "max_iters"),
        (dict(guess=jnp.ones(4)), ValueError, "guess"),
        (dict(guess=(jnp.ones(3),)), ValueError, "guess"),
    ),
    ids=str,
)
def test_bad_input(kwargs, error, message):
    with pytest.raises(error, match=rf"deer_scan\({message}=...\)"):
        deer_scan(_cumsum, 0.0, jnp.ones(3), **cast(Any, kwargs))


def test_bad_carries():
    with pytest.raises(TypeError, match="depends on one that is"):
        deer_scan(
            lambda c, x: ((jnp.where(c[1] > 2, 1, 0), c[1] + x), None),
            (jnp.array(0), jnp.array(0.0)),
            jnp.ones(3),
        )


def test_complex_carry():
    def f(c, x):
        # Not holomorphic.
        c = 0.5 * jnp.conj(c) * jnp.abs(c) + x
        return c, c

    xs = jnp.array([0.3 + 0.1j, -0.2j, 0.7, 0.1 + 0.4j])
    actual, expected = deer_scan(f, 0.2 + 0j, xs), lax.scan(f, 0.2 + 0j, xs)
    assert actual[1].dtype == expected[1].dtype
    assert jnp.allclose(actual[0], expected[0], rtol=1e-9, atol=0)
    assert jnp.allclose(actual[1], expected[1], rtol=1e-9, atol=0)
