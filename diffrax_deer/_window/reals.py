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
    holomorphic, and so have no other Jacobian than that of these."""

    def pair(x, like):
        return jnp.stack([jnp.real(x), jnp.imag(x)]) if jnp.iscomplexobj(like) else x

    return ravel_pytree(jtu.tree_map(pair, y, like))[0]


def unravel_like(y: PyTree[Array]) -> Callable[[Float[Array, " size"]], PyTree[Array]]:
    """The inverse."""

    def pair(x):
        return (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else x

    _, unravel = ravel_pytree(jtu.tree_map(pair, y))
    join = lambda x: lax.complex(*x) if isinstance(x, tuple) else x
    structure = jtu.tree_structure(y)

    def unraveled(x):
        leaves = structure.flatten_up_to(unravel(x))
        return structure.unflatten(map(join, leaves))

    return unraveled
