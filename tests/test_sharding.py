"""The time axis over several devices, which here are parts of a CPU."""

import re

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest
from diffrax_deer import (
    ConstantGuess,
    deer_scan,
    DeerAdjoint,
    DeerSolver,
    ELK,
    GaussLegendre,
    NestedGuess,
    QuasiDEER,
)
from jax.sharding import NamedSharding, PartitionSpec as P

from .helpers import diffeqsolve, max_error, problem, SaveAt, split_problem


def over_time(*shape, names=("time",)):
    mesh = jax.make_mesh(shape, names, devices=jax.devices()[: jnp.prod(jnp.array(shape))])
    return NamedSharding(mesh, P("time"))


default = diffrax.RecursiveCheckpointAdjoint()
at_end, within = SaveAt(t1=True), SaveAt(ts=jnp.array([0.1, 0.35, 0.77]), t1=True)


def solve(sharding, solver, adjoint=default, saveat=at_end, substeps=32, **kwargs):
    term, y0, args = problem()

    def value(y0, args):
        sol = diffeqsolve(
            term,
            DeerSolver(solver, substeps, sharding=sharding, **kwargs),
            *(0.0, 1.0, 1.0, y0, args),
            adjoint=adjoint,
            saveat=saveat,
            max_steps=1,
        )
        return jnp.sum(jnp.sin(sol.ys)), (sol.ys, sol.stats)

    fn = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
    return jax.jit(fn)(y0, args)


@pytest.mark.parametrize(
    "solver,adjoint,saveat,kwargs",
    (
        (diffrax.Tsit5(), default, at_end, {}),
        (diffrax.Tsit5(), DeerAdjoint(), within, dict(guess=NestedGuess())),
        (GaussLegendre(2), DeerAdjoint(), at_end, dict(method=ELK())),
        (diffrax.Heun(), diffrax.DirectAdjoint(), within, dict(method=QuasiDEER())),
    ),
    ids=("default", "nested", "ELK", "quasi"),
)
def test_as_on_one_device(solver, adjoint, saveat, kwargs):
    args = (solver, adjoint, saveat)
    kwargs = dict(guess=ConstantGuess()) | kwargs
    (expected, aux), expected_grad = solve(None, *args, **kwargs)
    (value, new_aux), grad = solve(over_time(8), *args, **kwargs)
    ys, new_ys = aux[0], new_aux[0]
    assert max_error(new_ys, ys) < 1e-12
    assert max_error(grad, expected_grad) < 1e-10
