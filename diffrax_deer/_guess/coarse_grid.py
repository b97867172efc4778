import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Real

from .._time_axis import first_of
from .._window import Discretisation, Iterate


# Of the solution on a coarser grid. Its discretisation error is larger.
ROUGH_RTOL = 1e-3
# A grid that is too coarse need not have a solution at all.
ROUGH_MAX_ITERS = 64


def coarse_grid(
    ts: Real[Array, " substeps_plus_1"], steps: int
) -> Real[Array, " steps_plus_1"]:
    """Some of the times in `ts`, about evenly spaced, such that there are `steps` steps
    between them."""
    # All large steps consist of as many substeps, but the first ones of one more. (To
    # round a multiple of `substeps / steps` instead would overflow on long windows.)
    # Substeps of length zero, with which a window may be padded, do not count.
    used = jnp.maximum(first_of(ts >= ts[-1]), 1)
    short, num_long = used // steps, used % steps
    index = jnp.arange(steps + 1, dtype=jnp.int32)
    return ts[index * short + jnp.minimum(index, num_long)]


def unless_constant_is_better(
    problem: Discretisation, ys: Float[Array, "substeps size"]
) -> Iterate:
    """Of these values and constant ones, those that leave the smaller residual."""
    window = problem.window

    def size(at: Iterate):
        net = window.net(jtu.tree_map(jnp.subtract, window.all_targets(at), at))
        size = jnp.max(jnp.abs(net), initial=0)
        return jnp.where(jnp.isfinite(size), size, jnp.inf)

    guess = window.interpolated(ys)
    constant = window.interpolated(jnp.broadcast_to(window.y0[None], ys.shape))
    both = jtu.tree_map(lambda *x: jnp.stack(x), guess, constant)
    best = jnp.argmin(jax.vmap(size)(both))
    return jtu.tree_map(lambda x: x[best], both)
