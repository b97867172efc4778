"""The problems of the studies, and how they are solved: over one and the same grid, by
the sequential solver or by `DeerSolver`."""

from collections.abc import Callable
from typing import Any, cast, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
from diffeqzoo import backend, ivps
from diffrax_deer import DeerAdjoint, DeerSolver
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from . import _two_body


if not cast(Any, backend).has_been_selected:
    cast(Any, backend).select("jax")


class Problem(NamedTuple):
    term: dfx.ODETerm
    y0: Float[Array, " size"]
    # The parameters, if derivatives with respect to these are of interest.
    args: Any
    t1: float
    substeps: int

    @property
    def inputs(self) -> tuple[Array, Any]:
        return self.y0, self.args


class Solved(NamedTuple):
    y1: Float[Array, " size"]
    num_iterations: Int[Array, ""]
    # How many evaluations followed one another.
    span: Int[Array, ""]
    okay: Bool[Array, ""]


# A function of `Problem.inputs`.
Solve = Callable[[Array, Any], Solved]


def zoo(name: str, t1: float, substeps: int, **kwargs: Any) -> Problem:
    """A problem of the literature."""
    f, y0, _, params = getattr(ivps, name)(**kwargs)
    term = dfx.ODETerm(lambda t, y, args: f(y, *params))
    return Problem(term, jnp.asarray(y0, jnp.float64), None, t1, substeps)


def van_der_pol(t1: float, substeps: int) -> Problem:
    return zoo("van_der_pol_first_order", t1, substeps, stiffness_constant=2.0)


def two_body(length: float = 1, substeps: int = 128) -> Problem:
    """`length` is in units of the two revolutions that the other benchmarks make."""
    y0 = _two_body.initial_value()
    return Problem(_two_body.term, y0, None, length * _two_body.T, substeps)


def neural(size: int) -> Problem:
    """A random recurrent network, in continuous time."""

    def vector_field(t, y, weight):
        return jnp.tanh(weight @ y) - 0.1 * y

    y0 = jnp.linspace(-1.0, 1.0, size)
    return Problem(dfx.ODETerm(vector_field), y0, _random_matrix(size), 4.0, 64)


def driven(size: int, t1: float, substeps: int) -> Problem:
    """A random recurrent network which forgets its past, and goes on being driven."""
    frequencies = jnp.linspace(0.5, 2.0, size)

    def vector_field(t, y, weight):
        return jnp.tanh(weight @ y + jnp.sin(frequencies * t)) - y

    y0 = jnp.linspace(-1.0, 1.0, size)
    return Problem(dfx.ODETerm(vector_field), y0, _random_matrix(size), t1, substeps)


def problems() -> dict[str, Problem]:
    return {
        "van der Pol": van_der_pol(10.0, 256),
        # Until then, distances grow by a factor of about 1e4.
        "Lorenz": zoo("lorenz63", 10.0, 1024),
        "two bodies": two_body(),
        "Pleiades": zoo("pleiades_first_order", 1.5, 128),
    }


def sequential(
    problem: Problem, adjoint: dfx.AbstractAdjoint = dfx.RecursiveCheckpointAdjoint()
) -> Solve:
    """Tsit5, one step after the other."""

    def solve(y0, args):
        t0, t1 = _interval(problem, y0)
        sol = dfx.diffeqsolve(
            *(problem.term, dfx.Tsit5(), t0, t1, t1 / problem.substeps, y0, args),
            # Rounding errors may leave another step to be made.
            max_steps=problem.substeps + 1,
            adjoint=adjoint,
        )
        span = 6 * problem.substeps + 1
        return Solved(_final(sol), jnp.array(0), jnp.array(span), jnp.array(True))

    return solve


def reference(problem: Problem) -> Callable[[Array, Any], Array]:
    """The same, but exactly on the grid of `DeerSolver`, which takes longer."""

    def solve(y0, args):
        t0, t1 = _interval(problem, y0)
        index = jnp.arange(problem.substeps + 1)
        ts = t0 + index.astype(y0.dtype) / problem.substeps * (t1 - t0)
        sol = dfx.diffeqsolve(
            *(problem.term, dfx.Tsit5(), t0, t1, None, y0, args),
            stepsize_controller=dfx.StepTo(ts=ts),
            max_steps=problem.substeps,
        )
        return _final(sol)

    return solve


def parallel(problem: Problem, *, windows: int = 1, **kwargs: Any) -> Solve:
    """`DeerSolver`, in as many windows. It may fail, and then says so."""

    def solve(y0, args):
        t0, t1 = _interval(problem, y0)
        sol = dfx.diffeqsolve(
            problem.term,
            DeerSolver(dfx.Tsit5(), problem.substeps // windows, **kwargs),
            *(t0, t1, t1 / windows, y0, args),
            max_steps=windows,
            adjoint=DeerAdjoint(max_windows=windows),
            throw=False,
        )
        okay = sol.result == dfx.RESULTS.successful
        stats = sol.stats
        counts = stats["num_iterations"], stats["sequential_evaluations"]
        return Solved(_final(sol), *counts, okay)

    return solve


def loss_and_grad(solve: Solve) -> Callable:
    """With respect to the initial value and to the parameters."""

    def loss(y0, args):
        return jnp.sum(jnp.sin(solve(y0, args).y1))

    return jax.value_and_grad(loss, argnums=(0, 1))


def error(x: PyTree[Array], reference: PyTree[Array]) -> float:
    """The largest one, relative to the largest number of all."""
    flat, reference = (ravel_pytree(x)[0] for x in (x, reference))
    difference = jnp.max(jnp.abs(flat.astype(reference.dtype) - reference))
    return float(difference / jnp.max(jnp.abs(reference)))


def _random_matrix(size):
    """With a spectral radius of about 1."""
    weight = np.random.default_rng(0).normal(size=(size, size))
    return jnp.asarray(weight / np.sqrt(size))


def _interval(problem, y0):
    return jnp.zeros((), y0.dtype), jnp.asarray(problem.t1, y0.dtype)


def _final(sol) -> Array:
    return jnp.asarray(sol.ys)[-1]
