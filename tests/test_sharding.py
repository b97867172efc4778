"""The time axis over several devices, which here are parts of a CPU."""

import dataclasses
import math
import re
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from diffrax_deer import (
    AdaptiveGrid,
    deer_scan,
    DeerAdjoint,
    DeerSolver,
    ELK,
    GaussLegendre,
    NestedGuess,
    QuasiDEER,
    SequentialScan,
)
from diffrax_deer._scan import ShardedScan
from diffrax_deer._time_axis import divided, running
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from .helpers import deer, diffeqsolve, max_error, over_time, problem, SaveAt


default = diffrax.RecursiveCheckpointAdjoint()
ends = SaveAt(t1=True)
points = SaveAt(ts=jnp.array([0.1, 0.35, 0.77]), t1=True)


def solved(solver, adjoint, saveat, y0, args) -> Any:
    term, *_ = problem()
    sol = diffeqsolve(
        *(term, solver, 0.0, 1.0, 1.0, y0, args),
        adjoint=adjoint,
        saveat=saveat,
        max_steps=1,
    )
    return sol.ys


def value_and_grad(*args):
    solver, adjoint, saveat = args
    loss = lambda y0, x: jnp.sum(jnp.sin(solved(solver, adjoint, saveat, y0, x)))
    return jax.value_and_grad(loss, argnums=(0, 1))


@pytest.mark.parametrize(
    "adjoint,saveat,solver",
    (
        (default, ends, deer(diffrax.Tsit5(), 32)),
        (DeerAdjoint(), points, DeerSolver(diffrax.Tsit5(), 128, guess=NestedGuess(2))),
        (DeerAdjoint(), ends, deer(GaussLegendre(2), 16, method=ELK())),
        (diffrax.DirectAdjoint(), points, deer(diffrax.Heun(), 16, method=QuasiDEER())),
        (DeerAdjoint(), points, deer(diffrax.Bosh3(), 32, grid=AdaptiveGrid())),
    ),
    ids=("plain", "nested", "ELK", "quasi", "grid"),
)
def test_as_on_one_device(adjoint, saveat, solver):
    _, y0, args = problem()

    def run(sharding):
        divided = dataclasses.replace(solver, sharding=sharding)
        return jax.jit(value_and_grad(divided, adjoint, saveat))(y0, args)

    assert max_error(run(over_time(8)), run(None)) < 1e-11


def test_dense_output_and_events():
    term, y0, args = problem()

    def run(sharding):
        sol = diffeqsolve(
            *(term, deer(diffrax.Tsit5(), 32, sharding=sharding)),
            *(0.0, 1.0, 1.0, y0, args),
            adjoint=DeerAdjoint(),
            saveat=SaveAt(t1=True, dense=True),
            event=diffrax.Event(lambda t, y, args, **kwargs: y[0] - 0.8),
            max_steps=1,
        )
        return sol.ts, sol.ys, jax.vmap(sol.evaluate)(sol.ts[0] * jnp.linspace(0, 1, 5))

    expected = run(None)
    assert 0 < expected[0][0] < 1
    assert max_error(run(over_time(8)), expected) < 1e-12


# Also that the time axis is divided over two axes of the mesh, or not at all.
@pytest.mark.parametrize("shape", ((1,), (2, 4)), ids=str)
def test_meshes(shape):
    _, y0, args = problem()
    names = ("host", "time")[-len(shape) :]
    sharding = NamedSharding(over_time(*shape, names=names).mesh, P(names))
    solver = deer(diffrax.Tsit5(), 32)
    run = lambda solver: solved(solver, DeerAdjoint(), ends, y0, args)
    actual = run(dataclasses.replace(solver, sharding=sharding))
    assert max_error(actual, run(solver)) < 1e-12


def test_batches():
    _, y0, args = problem()
    y0s = y0 * jnp.linspace(0.5, 1.5, 4)[:, None]
    sharding = over_time(2, 4, names=("batch", "time"))
    solver = deer(diffrax.Tsit5(), 32)

    def gradients(solver):
        one = value_and_grad(solver, DeerAdjoint(), points)
        return jax.jit(jax.vmap(one, in_axes=(0, None)))

    expected = gradients(solver)(y0s, args)
    divided = gradients(dataclasses.replace(solver, sharding=sharding))
    mesh = sharding.mesh
    y0s = jax.device_put(y0s, NamedSharding(mesh, P("batch")))
    compiled: Any = divided.lower(y0s, args).compile()
    assert max_error(compiled(y0s, args), expected) < 1e-11
    # Each device has half of the batch, and a quarter of the time axis.
    assert "f64[2,8,3]" in compiled.as_text()
    assert "f64[4,8,3]" not in compiled.as_text()


LENGTH = 128 * 127


def sizes(program):
    """The lengths of all axes of all arrays."""
    shapes = re.findall(r"[a-z]\d+\[([\d,]+)\]", program)
    return {int(size) for shape in shapes for size in shape.split(",")}


@pytest.mark.parametrize(
    "adjoint,saveat,solver",
    (
        (default, ends, DeerSolver(diffrax.Tsit5(), LENGTH)),
        (DeerAdjoint(), points, DeerSolver(GaussLegendre(3), LENGTH)),
    ),
    ids=("default", "DeerAdjoint"),
)
def test_no_device_has_it_all(adjoint, saveat, solver):
    # Nor a multiple of it. (As it is 128 times a prime number, and there are few other
    # powers of 2.) And what they exchange does not depend on how long it is.
    _, y0, args = problem()
    solver = dataclasses.replace(solver, sharding=over_time(8))
    fn = jax.jit(value_and_grad(solver, adjoint, saveat))
    program: Any = fn.lower(y0, args).compile().as_text()
    assert not any(size % LENGTH in (0, 1) for size in sizes(program) - {1})
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", program)
    assert len(gathered) > 0
    assert max(math.prod(map(int, x.split(","))) for x in gathered) == 8 * 3 * 3


@pytest.mark.parametrize(
    "fn,combine",
    ((jnp.cumsum, jnp.add), (jax.lax.cummax, jnp.maximum)),
    ids=("sum", "max"),
)
def test_running(fn, combine):
    x, sharding = jr.normal(jr.key(0), (24, 3)), over_time(4)
    actual = jax.jit(lambda x: running(fn, combine, divided(x, sharding), sharding))(x)
    assert max_error(actual, fn(x, axis=0)) < 1e-14


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("is_diagonal", (False, True))
def test_scan(is_diagonal, reverse):
    rng = np.random.default_rng(0)
    # Seven on each of the devices: no power of 2.
    shape = (56, 3) if is_diagonal else (56, 3, 3)
    A, b = rng.normal(size=shape), rng.normal(size=(56, 3))
    # What cannot be reached from anywhere, and what grows beyond all bounds.
    A[20], A[40:] = 0, 1e200 * A[40:]
    b[40:] = 0
    if not reverse:
        A[39] = 0
    scan = ShardedScan(SequentialScan(), over_time(8))
    run = lambda scan: jax.jit(lambda A, b: scan(A, b, reverse=reverse))(A, b)
    np.testing.assert_allclose(run(scan), run(SequentialScan()), rtol=1e-12)


@pytest.mark.parametrize("reverse", (False, True))
def test_recurrence(reverse):
    xs = jnp.sin(jnp.arange(32.0))

    def loss(init, xs, **kwargs):
        f = lambda carry, x: (jnp.tanh(weight @ carry + x), carry[0])
        return jnp.sum(deer_scan(f, init, xs, reverse=reverse, **kwargs)[1])

    weight, init = jnp.array([[0.4, -1.1], [0.9, 0.3]]), jnp.array([0.3, -0.2])
    run = lambda **kwargs: jax.jit(
        jax.value_and_grad(lambda *x: loss(*x, **kwargs), argnums=(0, 1))
    )(init, xs)
    assert max_error(run(sharding=over_time(4)), run()) < 1e-12


def test_refused():
    sharding = over_time(8)
    with pytest.raises(ValueError, match="multiple of 8"):
        DeerSolver(substeps=20, sharding=sharding)
    explicit = jax.make_mesh((8,), ("time",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match="AxisType.Auto"):
        DeerSolver(substeps=16, sharding=NamedSharding(explicit, P("time")))
    wrong: Any
    for wrong in ("time", sharding.mesh, NamedSharding(sharding.mesh, P())):
        with pytest.raises(TypeError, match=r"DeerSolver\(sharding"):
            DeerSolver(substeps=16, sharding=wrong)
    with pytest.raises(ValueError, match=r"deer_scan\(sharding"):
        f = lambda carry, x: (carry, None)
        deer_scan(f, jnp.zeros(1), jnp.zeros(9), sharding=sharding)
