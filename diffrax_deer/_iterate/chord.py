"""Linearised equations, and to use them for more than one iteration."""

import equinox as eqx
import equinox.internal as eqxi
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._custom_types import IntScalarLike
from .._linear_algebra import Matrices, matvec
from .._method import AbstractFullMethod, AbstractMethod
from .._window import AbstractElimination, AbstractWindow, Iterate


# From this size of the state on, Jacobians and their inverses take longer than what a
# chord method takes in addition.
_LARGE = 8
# What is not solved by so many iterations is rarely solved by more.
_FEW = 10


class Equations(eqx.Module):
    """The linearised equations of a window."""

    J: Matrices
    system: AbstractElimination

    def condense(
        self, r: Iterate, points: Float[Array, "substeps points size"]
    ) -> tuple[Iterate, Float[Array, "substeps parts points size"]]:
        """The corrections of each substep, if there is none at its start. And how large
        the terms are that the values at its points are summed up from."""
        # Of a sum, rounding errors are in proportion to its largest terms. (To no more
        # than the points: a large `J` must not excuse large residuals far from the
        # solution.)
        terms = matvec(jnp.minimum(jnp.abs(self.J), 1), jnp.abs(points)[:, None])
        return self.system.condense(r), terms


class Chord(eqx.Module):
    """A chord method for a single substep, with one Jacobian for all of its stages.

    **Attributes:**

    - `guess`: where it begins, and where Newton's method does if it fails.
    - `equations`: those that are linearised at this guess.
    - `max_iters`: how many iterations it has before it does.
    """

    guess: Iterate
    equations: Equations
    max_iters: IntScalarLike

    def is_over(self, num_iterations: Int[Array, ""]) -> Bool[Array, ""]:
        # In a batch, all or none.
        return eqxi.unvmap_any(num_iterations >= self.max_iters)


def chord(
    window: AbstractWindow,
    method: AbstractMethod,
    guess: Iterate,
    max_iters: IntScalarLike | None,
) -> Chord | None:
    """`None` if Newton's method takes less time. `max_iters` are those that there are
    for both."""
    if not isinstance(method, AbstractFullMethod) or window.y0.size < _LARGE:
        return None
    _, jacobians = method.linearise(*window.middle(guess))
    J = jacobians()
    J = jnp.where(jnp.isfinite(J), J, 0)
    few = _FEW if max_iters is None else max_iters // 3
    return Chord(guess, Equations(J, window.eliminate(J)), few)
