import abc

import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractLocalInterpolation
from jaxtyping import Array

from ._custom_types import PyTree, RealScalarLike


class AbstractInterpolation(AbstractLocalInterpolation):
    """An interpolation of states, which are PyTrees, given its values."""

    @abc.abstractmethod
    def at(self, t: RealScalarLike, left: bool) -> PyTree[Array]:
        """The value at a time. At a jump, that from the left or the right."""

    def evaluate(
        self, t0: RealScalarLike, t1: RealScalarLike | None = None, left: bool = True
    ) -> PyTree[Array]:
        if t1 is None:
            return self.at(t0, left)
        return jtu.tree_map(jnp.subtract, self.at(t1, left), self.at(t0, left))
