import math
from typing import Any, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from diffrax import ODETerm
from diffrax_deer import ConstantGuess, DeerSolver, Discretisation
from diffrax_deer._window import leaves_read, Scheme
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import Array


# Not typed, as most fields of a solution may be `None`. A test knows what it has saved.
diffeqsolve = cast(Any, diffrax.diffeqsolve)
SaveAt = cast(Any, diffrax.SaveAt)
StepTo = cast(Any, diffrax.StepTo)


# Newton's method converges to machine precision once it converges at all, as is needed
# here. (Diffrax's default would take its tolerances from an adaptive controller.)
root_finder = optx.Newton(rtol=1e-8, atol=1e-8)


explicit_solvers = (
    diffrax.Bosh3(),
    diffrax.Dopri5(),
    diffrax.Dopri8(),
    diffrax.Euler(),
    diffrax.Heun(),
    diffrax.Midpoint(),
    diffrax.Ralston(),
    diffrax.Tsit5(),
)
implicit_solvers = (
    diffrax.ImplicitEuler(root_finder=root_finder),
    diffrax.Kvaerno3(root_finder=root_finder),
    diffrax.Kvaerno5(root_finder=root_finder),
)


def deer(solver, substeps=1, **kwargs):
    """The default guess leaves nothing to iterate on a CPU. This one does, and is
    compiled most quickly.
    """
    return DeerSolver(solver, substeps, guess=ConstantGuess(), **kwargs)


def solver_id(solver):
    return type(solver).__name__


def over_time(*shape, names=("time",)):
    """Over this many devices, for each axis of the mesh."""
    devices = jax.devices()[: math.prod(shape)]
    kinds = (AxisType.Auto,) * len(shape)
    mesh = jax.make_mesh(shape, names, devices=devices, axis_types=kinds)
    return NamedSharding(mesh, P("time"))


class VectorField(eqx.Module):
    """A vector field that is nonlinear, depends on time, on `args`, and on parameters
    of its own."""

    weight: Array

    def __call__(self, t, y, args):
        return jnp.tanh(self.weight @ y) * args - 0.3 * y * jnp.cos(t)


def problem(dtype=jnp.float64):
    """A differential equation for whatever does not need a particular one."""
    weight = np.array([[-0.6, 1.1, 0.2], [-1.3, 0.1, 0.4], [0.3, -0.2, -0.8]])
    term = ODETerm(VectorField(jnp.asarray(weight, dtype)))
    y0 = jnp.array([1.0, -0.5, 0.3], dtype)
    args = jnp.array(0.9, dtype)
    return term, y0, args


def split_problem():
    """The same for the solvers that need a pair of terms."""
    terms = (
        ODETerm(lambda t, v, args: args * v),
        ODETerm(lambda t, x, args: -jnp.sin(x) * jnp.cos(t)),
    )
    y0 = (jnp.array([0.4, 1.2]), jnp.array([0.3, -0.1]))
    return terms, y0, jnp.array(0.9)


def discretised(solver, terms, args, ts, y0):
    reads = leaves_read(solver, terms, ts[0], ts[1], y0, args)
    return Discretisation(Scheme(solver, terms, args, y0, reads), ts[:-1], ts[1:])


def van_der_pol(t, y, mu):
    return jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


def lorenz(t, y, args):
    x, y, z = y
    return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


def sequential(terms, solver, ts, y0, args=None, *, saveat=SaveAt(t1=True), **kwargs):
    """The reference: `solver`, stepped over the grid `ts` as Diffrax does it."""
    return diffeqsolve(
        terms,
        solver,
        ts[0],
        ts[-1],
        None,
        y0,
        args,
        saveat=saveat,
        stepsize_controller=StepTo(ts=ts),
        max_steps=len(ts) - 1,
        **kwargs,
    )


def exact(terms, t0, t1, y0, args=None, *, saveat=SaveAt(t1=True)):
    """The solution itself, as far as double precision goes."""
    return diffeqsolve(
        terms,
        diffrax.Dopri8(),
        t0,
        t1,
        None,
        y0,
        args,
        saveat=saveat,
        stepsize_controller=diffrax.PIDController(rtol=1e-12, atol=1e-12),
        max_steps=None,
    )


def weighted_sum(y):
    """Depends on every single number, and on each in its own way."""
    weights = jnp.arange(1, y.size + 1, dtype=y.dtype).reshape(y.shape)
    return jnp.sum(jnp.sin(weights * y))


def max_error(x, y):
    """The largest difference relative to the magnitude of the leaf that it is in."""

    def leaf_error(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        if x.size == 0:
            return 0.0
        return float(np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1e-300))

    errors = jtu.tree_leaves(jtu.tree_map(leaf_error, x, y))
    assert not np.isnan(errors).any()
    return max(errors, default=0.0)
