import abc
import dataclasses

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from equinox import AbstractVar
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Shaped

from .._custom_types import IntScalarLike, PyTree
from .._linear_algebra import Matrices
from .._time_axis import before, first_of
from .rounding import nearby, noise


class Iterate(eqx.Module):
    """The unknowns of a window. (Or, as these are of the same shape, its residual, a
    correction, a derivative...)

    **Attributes:**

    - `ys`: the values at the ends of the substeps.
    - `ks`: what has to be solved for inside of every substep: the increments of its
        stages, for each part of the differential equation. There are none if a substep
        is a map that is only known as a whole.
    """

    ys: Float[Array, "*substeps size"]
    ks: Float[Array, "*substeps parts stages size"]


class AbstractElimination(eqx.Module):
    """The linearised equations of all substeps, solved for their stages and ends, given
    the corrections at their starts. Both methods are linear functions.

    **Attributes:**

    - `A`: the Jacobians of the substeps.
    - `is_exact`: whether the equations are solved exactly.
    """

    A: AbstractVar[Matrices]
    is_exact: AbstractVar[bool]

    @abc.abstractmethod
    def condense(self, r: Iterate) -> Iterate:
        """The corrections at the ends and of the stages of each substep, if there is
        none at its start. `r` are the residuals."""

    @abc.abstractmethod
    def substitute(
        self, starts: Float[Array, "substeps size"], condensed: Iterate
    ) -> Float[Array, "substeps parts stages size"]:
        """The corrections of the stages, given those at the starts. `condensed` are
        those without."""


class AbstractWindow(eqx.Module):
    r"""Abstract base class for the substeps that are solved jointly.

    Each substep evaluates a function at one or more *points*. These depend linearly on
    the unknowns: on the value at its start, and on its stages. The equations to be
    solved are that its stages and its end are what follows from the values of this
    function, which is linear again.

    **Attributes:**

    - `y0`: the value at the start of the window.
    - `xs`: what else the substeps depend on. A PyTree with a leading axis `substeps`.
    - `eps`: the precision of the least precise part of the state.
    - `sharding`: how the time axis is divided over devices. `None` if it is not.
    """

    y0: AbstractVar[Float[Array, " size"]]
    xs: AbstractVar[PyTree[Shaped[Array, "substeps ..."]]]
    eps: AbstractVar[float]
    sharding: AbstractVar[NamedSharding | None]

    @property
    @abc.abstractmethod
    def stage_shape(self) -> tuple[int, int]:
        """How many parts and stages are unknown in each substep."""

    @property
    @abc.abstractmethod
    def is_explicit(self) -> bool:
        """Whether the unknowns can be found one after the other."""

    @property
    @abc.abstractmethod
    def is_bounded(self) -> bool:
        """Whether a correction far beyond the size of the solution is a mistake."""

    @abc.abstractmethod
    def value(
        self, x: PyTree[Array], points: Float[Array, "points size"]
    ) -> Float[Array, "parts points size"]:
        """The function of a single substep. Only here is evaluated what is being
        solved. Each row depends on the same row of `points` only."""

    @abc.abstractmethod
    def points(self, at: Iterate) -> Float[Array, "substeps points size"]:
        """Where the function has to be evaluated."""

    @abc.abstractmethod
    def targets(
        self, at: Iterate, values: Float[Array, "substeps parts points size"]
    ) -> Iterate:
        """What the unknowns should be, given the values of the function."""

    @abc.abstractmethod
    def idle(self, at: Iterate) -> Float[Array, "substeps _parts _points size"]:
        """The values of the function if nothing happened in the substeps."""

    @property
    @abc.abstractmethod
    def idle_jacobian(self) -> float:
        """The Jacobian of the function if nothing happened, as a multiple of 1."""

    @abc.abstractmethod
    def eliminate(self, J: Matrices) -> AbstractElimination:
        """`J` are the Jacobians of the function, with axes `substeps parts points`, and
        one or two more. Those at a single point stand for all others as well."""

    @abc.abstractmethod
    def net(self, r: Iterate) -> Float[Array, "substeps size"]:
        """What a residual amounts to at the end of each substep, if nothing happened
        in them."""

    @abc.abstractmethod
    def as_residual(
        self, errors: Float[Array, "substeps parts points size"]
    ) -> Iterate:
        """How large residuals may be because of such errors of the values."""

    @abc.abstractmethod
    def interpolated(self, ys: Float[Array, "substeps size"]) -> Iterate:
        """These values at the ends, and stages that lie in between."""

    @abc.abstractmethod
    def sequential(self) -> Iterate:
        """The solution, one substep after the other. These must be explicit."""

    @abc.abstractmethod
    def derivative(
        self,
        at: Iterate,
        tangent: "AbstractWindow",
        start: Float[Array, " size"],
        b: Iterate | None,
    ) -> Iterate:
        """Solves the linearised equations, one substep after the other. These must be
        explicit.

        `start` is the derivative of `y0`, and `tangent` is that of all else, in which
        anything may be missing. What follows from it may also be given, as `b`.
        """

    def zeros(self, substeps: int) -> Iterate:
        """What the unknowns look like."""
        ys = jnp.zeros((substeps, self.y0.size), self.y0.dtype)
        return Iterate(
            ys, jnp.zeros((substeps, *self.stage_shape, self.y0.size), ys.dtype)
        )

    @property
    def core(self) -> "AbstractWindow":
        """All that does not depend on the substep."""
        replace = lambda w: (w.xs, w.y0)
        return eqx.tree_at(replace, self, (None, None), is_leaf=lambda x: x is None)

    def substep(
        self, index: IntScalarLike, y0: Float[Array, " size"]
    ) -> "AbstractWindow":
        """A single substep, as a window that begins with this value."""
        cut = lambda x: lax.dynamic_slice_in_dim(x, index, 1)
        xs = jtu.tree_map(cut, self.xs)
        return dataclasses.replace(self, xs=xs, y0=y0, sharding=None)

    def noise(
        self,
        points: Float[Array, "substeps points size"],
        r: Iterate,
        wanted: Bool[Array, ""],
    ) -> Float[Array, "substeps parts points size"]:
        """How large the rounding errors of the values may be. Zero if not wanted."""
        del r
        distance = nearby(jnp.abs(points), self.eps)
        return noise(self.values, points, distance, wanted)

    def starts(
        self, ys: Float[Array, "substeps size"]
    ) -> Float[Array, "substeps size"]:
        """The values at the start of every substep, from those at their ends."""
        return before(ys, self.y0)

    def values(
        self, points: Float[Array, "substeps points size"]
    ) -> Float[Array, "substeps parts points size"]:
        """The functions of all substeps."""
        return jax.vmap(self.value)(self.xs, points)

    def all_targets(self, at: Iterate) -> Iterate:
        """What the unknowns should be. At the solution this is what they are."""
        return self.targets(at, self.values(self.points(at)))

    def finite(self, at: Iterate) -> Iterate:
        """Replaces what is not finite: by the value at the start of the window, and by
        stages between the ends."""
        ys = jnp.where(is_finite(at.ys)[:, None], at.ys, self.y0[None])
        stages = self.interpolated(ys).ks
        is_usable = jnp.all(is_finite(at.ks), axis=(1, 2))[:, None, None, None]
        return Iterate(ys, jnp.where(is_usable, at.ks, stages))


def is_finite(x: Float[Array, "*shape size"]) -> Array:
    """Whether all entries along the last axis are finite, and so would be their
    differences."""
    return jnp.all(jnp.abs(x) < jnp.finfo(x.dtype).max / 4, axis=-1)


def up_to_front(is_open: Bool[Array, " substeps"]) -> Bool[Array, " substeps"]:
    """Which substeps begin with a final value, given which of them leave a residual:
    all before the first one of these, and that one."""
    return jnp.arange(len(is_open), dtype=jnp.int32) <= first_of(is_open)
