"""Two bodies on nearly circular orbits, twice around."""

import diffrax as dfx
import jax.numpy as jnp


T = 10.0


def vector_field(t, y, args):
    x, v = jnp.split(y, 2)
    x1, x2 = jnp.split(x, 2)
    r = x1 - x2
    a = -r / jnp.sum(r**2) ** 1.5
    return jnp.concatenate([v, a, -a])


term = dfx.ODETerm(vector_field)


def initial_value():
    # A distance of 1; at speeds of `sqrt(1 / 2)` the orbits would be circles.
    return jnp.array([0.5, 0.0, -0.5, 0.0, 0.0, 0.7, 0.0, -0.7])


def exact(y0, ts):
    """The solution, as far as double precision goes."""
    return dfx.diffeqsolve(
        term,
        dfx.Dopri8(),
        0,
        T,
        None,
        y0,
        stepsize_controller=dfx.PIDController(rtol=1e-13, atol=1e-13),
        saveat=dfx.SaveAt(ts=ts),
    ).ys
