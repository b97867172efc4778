import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from ._custom_types import PyTree


def with_zeros(tangent: PyTree[Array | None], primal: PyTree[Array]) -> PyTree[Array]:
    """A tangent, with zeros where it is missing: Equinox leaves away those of what does
    not depend on anything that is differentiated."""
    fill = lambda t, x: jnp.zeros_like(x) if t is None else t
    return jtu.tree_map(fill, tangent, primal, is_leaf=lambda x: x is None)
