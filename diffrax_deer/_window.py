import abc
import functools as ft
from typing import Any, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox import AbstractVar
from jaxtyping import Array, Bool, Float, PyTree, Real, Shaped

from ._noise import is_noisy, nearby, noise
from ._step import OneStepMap, Substep


# The size of the weights that the stages of a step enter it with. (Of Tsit5, the root
# of the sum of their squares is 4.3.)
_WEIGHTS = 4


class AbstractWindow(eqx.Module):
    """Substeps that are solved jointly. Each of them maps a value to the next one,
    depending on an input of its own."""

    # The value at the start of the window.
    y0: AbstractVar[Float[Array, " size"]]

    @property
    @abc.abstractmethod
    def eps(self) -> float:
        """The precision of the least precise part of the state."""

    @property
    @abc.abstractmethod
    def inputs(self) -> PyTree[Shaped[Array, "substeps ..."]]:
        """The inputs of all substeps."""

    @abc.abstractmethod
    def substep(self, x: PyTree[Array], y: Float[Array, " size"]) -> Array:
        """A single substep, with one of the inputs."""

    @abc.abstractmethod
    def noise(
        self,
        starts: Float[Array, "substeps size"],
        r: Float[Array, "substeps size"],
        wanted: Bool[Array, ""],
    ) -> Float[Array, "substeps size"]:
        """How large the residuals `r` may be because of rounding errors made on values
        other than those that the substeps begin and end with. Zero if not wanted."""

    def starts(
        self, ys: Float[Array, "substeps size"]
    ) -> Float[Array, "substeps size"]:
        """The values at the start of every substep, from those at their ends."""
        return jnp.concatenate([self.y0[None], ys[:-1]])

    def ends(
        self, starts: Float[Array, "substeps size"]
    ) -> Float[Array, "substeps size"]:
        """The values that the substeps lead to."""
        return jax.vmap(self.substep)(self.inputs, starts)

    def jacobian(
        self, starts: Float[Array, "substeps size"]
    ) -> Float[Array, "substeps size size"]:
        """The exact Jacobian of every substep."""
        return jax.vmap(jax.jacfwd(self.substep, argnums=1))(self.inputs, starts)

    def finite(
        self, ys: Float[Array, "substeps size"]
    ) -> Float[Array, "substeps size"]:
        """Replaces values that are not finite by the one at the start of the window."""
        return jnp.where(is_finite(ys)[:, None], ys, self.y0[None])


def is_finite(ys: Float[Array, "substeps size"]) -> Bool[Array, " substeps"]:
    """Whether all values of a substep are finite, and so are their differences."""
    return jnp.all(jnp.abs(ys) < jnp.finfo(ys.dtype).max / 4, axis=-1)


def up_to_front(is_open: Bool[Array, " substeps"]) -> Bool[Array, " substeps"]:
    """Which substeps begin with a final value, given which of them leave a residual:
    all before the first one of these, and that one."""
    front = jnp.where(jnp.any(is_open), jnp.argmax(is_open), len(is_open))
    return jnp.arange(len(is_open), dtype=jnp.int32) <= front.astype(jnp.int32)


class Window(AbstractWindow):
    """Steps of the wrapped solver."""

    step: OneStepMap
    # The times at which the substeps begin and end.
    ts: Real[Array, " substeps_plus_1"]
    y0: Float[Array, " size"]

    @property
    def eps(self) -> float:
        return self.step.eps

    @property
    def inputs(self) -> tuple[Array, Array]:
        return self.ts[:-1], self.ts[1:]

    def substep(self, x: tuple[Array, Array], y: Float[Array, " size"]) -> Array:
        t0, t1 = x
        return self.step(t0, t1, y)

    def noise(
        self,
        starts: Float[Array, "substeps size"],
        r: Float[Array, "substeps size"],
        wanted: Bool[Array, ""],
    ) -> Float[Array, "substeps size"]:
        # A step adds something small to the value that it begins with, so that rounding
        # errors made on the former only matter if these are made in a lower precision.
        if not is_noisy(self.eps):
            return jnp.zeros_like(r)
        distance = nearby(jnp.abs(starts), self.eps)
        if self.step.vector_field is None:
            return noise(self.ends, starts, distance, wanted)
        vector_field = jax.vmap(self.step.vector_field)
        vector_field = ft.partial(vector_field, self.ts[:-1])
        dt = jnp.abs(jnp.diff(self.ts)).astype(r.dtype)[:, None]
        return _WEIGHTS * dt * noise(vector_field, starts, distance, wanted)

    # The size of the axis has to be given for the sake of states without any leaf.

    def ravel_all(self, ys: PyTree[Any]) -> Float[Array, "substeps size"]:
        return jax.vmap(self.step.ravel, axis_size=self.ts.size - 1)(ys)

    def unravel_all(self, ys: Float[Array, "substeps size"]) -> PyTree[Array]:
        return jax.vmap(self.step.unravel)(ys)

    def substeps(self, starts: Float[Array, "substeps size"]) -> Substep:
        """The full output of each substep, with a leading axis `substeps`."""
        return self.step.substeps(*self.inputs, starts)

    def vector_field_jacobian(
        self, ys: Float[Array, "substeps size"]
    ) -> Float[Array, "substeps size size"]:
        """The Jacobian of the vector field at the end of every substep."""
        assert self.step.vector_field is not None
        jacobian = jax.jacfwd(self.step.vector_field, argnums=1)
        return jax.vmap(jacobian)(self.ts[1:], ys)


def has_linear_ode(window: AbstractWindow) -> TypeGuard[Window]:
    """Whether the substeps are those of an ordinary differential equation, by a solver
    of which it is known what it does to a linear one."""
    return (
        isinstance(window, Window)
        and window.step.vector_field is not None
        and window.step.exponential is not None
    )
