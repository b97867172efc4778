"""States as vectors of real numbers."""

from collections.abc import Callable

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from .._custom_types import PyTree


def ravel(y: PyTree[Array], like: PyTree[Array]) -> Float[Array, " size"]:
    """Of a complex leaf, the real and the imaginary parts. Vector fields need not be
    holomorphic, and so have no other Jacobian than that of these.

    In single precision at least: sums and linear systems of less are of little use, and
    the latter are not even implemented everywhere.
    """

    def pair(x, like):
        x = jnp.stack([jnp.real(x), jnp.imag(x)]) if jnp.iscomplexobj(like) else x
        return _at_least_single(x)

    return ravel_pytree(jtu.tree_map(pair, y, like))[0]


def unravel_like(y: PyTree[Array]) -> Callable[[Float[Array, " size"]], PyTree[Array]]:
    """The inverse."""

    def pair(x):
        x = (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else x
        return jtu.tree_map(_at_least_single, x)

    _, unravel = ravel_pytree(jtu.tree_map(pair, y))
    leaves, structure = jtu.tree_flatten(y)
    join = lambda x: lax.complex(*x) if isinstance(x, tuple) else x

    def unraveled(x):
        parts = map(join, structure.flatten_up_to(unravel(x)))
        cast = lambda x, leaf: x.astype(leaf.dtype)
        return structure.unflatten(map(cast, parts, leaves))

    return unraveled


def _at_least_single(x):
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x
