"""Never a silently wrong number: random vector fields, many of which blow up."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from diffrax import ODETerm
from diffrax_deer import CoarseGuess, ConstantGuess, DeerSolver

from .helpers import diffeqsolve, SaveAt


BATCH = 200


def _vector_field(t, y, args):
    linear, quadratic, cubic, frequency = args
    return (
        linear @ y
        + jnp.einsum("ijk,j,k->i", quadratic, y, y)
        - cubic * y**3
        + jnp.sin(frequency * t)
    )


def _problems(seed, dtype):
    keys = jr.split(jr.key(seed), 7)
    normal = lambda key, *shape: jr.normal(key, (BATCH, *shape), dtype)
    args = (
        2 * normal(keys[0], 3, 3),
        0.5 * normal(keys[1], 3, 3, 3),
        jr.choice(keys[2], jnp.array([0, 0.1, 1], dtype), (BATCH, 1)),
        3 * normal(keys[3], 1),
    )
    magnitude = 10 ** jr.uniform(keys[4], (BATCH, 1), dtype, -2, 1)
    t1 = 10 ** jr.uniform(keys[5], (BATCH,), dtype, -1, 1)
    return magnitude * normal(keys[6], 3), args, t1


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(0, 0, 0, None, None, None))
def _deer(y0, args, t1, solver, substeps, guess):
    sol = diffeqsolve(
        ODETerm(_vector_field),
        DeerSolver(solver, substeps, guess=guess),
        0 * t1,
        t1,
        t1,
        y0,
        args,
        saveat=SaveAt(t1=True),
        throw=False,
    )
    return sol.ys[0], sol.result == diffrax.RESULTS.successful


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(0, 0, 0, None, None))
def _sequential(y0, args, t1, solver, substeps):
    term = ODETerm(_vector_field)

    def body(y, t0__t1):
        state = solver.init(term, *t0__t1, y, args)
        return solver.step(term, *t0__t1, y, args, state, False)[0], None

    ts = t1 * jnp.linspace(0, 1, substeps + 1, dtype=y0.dtype)
    return jax.lax.scan(body, y0, (ts[:-1], ts[1:]))[0]


# Each two of these together.
@pytest.mark.parametrize(
    "solver,substeps,dtype",
    (
        (diffrax.Heun(), 4, jnp.float64),
        (diffrax.Heun(), 32, jnp.float32),
        (diffrax.Tsit5(), 4, jnp.float32),
        (diffrax.Tsit5(), 32, jnp.float64),
    ),
    ids=("Heun-4", "Heun-32", "Tsit5-4", "Tsit5-32"),
)
def test_random(solver, substeps, dtype):
    eps = float(jnp.finfo(dtype).eps)
    y0, args, t1 = _problems(substeps, dtype)
    ref = np.asarray(_sequential(y0, args, t1, solver, substeps))
    # What a rounding error in the initial value becomes is as much as can be asked for.
    nearby = np.asarray(_sequential((1 + 4 * eps) * y0, args, t1, solver, substeps))
    finite = np.isfinite(ref).all(axis=-1) & np.isfinite(nearby).all(axis=-1)
    with np.errstate(invalid="ignore"):
        noise = np.abs(nearby - ref).max(axis=-1)
        tol = (1e-8 if dtype == jnp.float64 else 1e-3) * np.abs(ref).max(axis=-1)
    assert 50 < finite.sum() < BATCH
    for guess in (ConstantGuess(), CoarseGuess()):
        ys, okay = map(np.asarray, _deer(y0, args, t1, solver, substeps, guess))
        # As many iterations as substeps suffice, always.
        assert okay[finite].all()
        error = np.abs(ys[finite] - ref[finite]).max(axis=-1)
        assert (error <= tol[finite] + 300 * noise[finite]).all()
        # And whatever overflows does not pass for a solution.
        assert not okay[np.isnan(ref).any(axis=-1)].any()
