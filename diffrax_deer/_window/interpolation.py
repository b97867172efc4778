import dataclasses
from collections.abc import Callable

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractLocalInterpolation
from jaxtyping import Array, Int, Real

from .._custom_types import PyTree, RealScalarLike
from .._interpolation import AbstractInterpolation


def uniform_steps(
    t0: RealScalarLike, t1: RealScalarLike, substeps: int
) -> tuple[Real[Array, " substeps"], Real[Array, " substeps"]]:
    """The times at which the substeps of the window `[t0, t1]` begin and end."""
    index = jnp.arange(substeps)
    starts, ends = (grid_time(t0, t1, substeps, i) for i in (index, index + 1))
    return starts, ends


def grid_time(
    t0: RealScalarLike | Real[Array, "*#times"],
    t1: RealScalarLike | Real[Array, "*#times"],
    substeps: int,
    index: Int[Array, "*#times"],
) -> Real[Array, "*times"]:
    """Where some of the substeps begin, if they are equally long."""
    return time_at(t0, t1, index.astype(jnp.result_type(t0)) / substeps)


def time_at(
    t0: RealScalarLike | Real[Array, "*#times"],
    t1: RealScalarLike | Real[Array, "*#times"],
    fraction: Real[Array, "*#times"],
) -> Real[Array, "*times"]:
    """The time after this fraction of the window. Exact at both ends."""
    return jnp.where(fraction == 1, t1, t0 + fraction * (t1 - t0))


class WindowInterpolation(AbstractInterpolation):
    """Inside each substep of a window, the interpolation of the wrapped solver."""

    t0: RealScalarLike
    t1: RealScalarLike
    # With a leading axis `substeps`
    dense_infos: PyTree[Array]
    # When substeps begin and end. `None` if they are equally long.
    fractions: Real[Array, " substeps_plus_1"] | None
    substeps: int
    interpolation_cls: Callable[..., AbstractLocalInterpolation]

    def at(self, t: RealScalarLike, left: bool) -> PyTree[Array]:
        length = self.t1 - self.t0
        length = jnp.where(length == 0, 1, length)
        fraction = lax.stop_gradient((t - self.t0) / length)
        # If rounding picks a neighbour, then that is evaluated a rounding error beyond
        # its end.
        if self.fractions is None:
            # Arithmetic rather than a search, as XLA can then fuse the batched
            # evaluation of many points.
            position = self.substeps * fraction
            index = jnp.ceil(position) - 1 if left else jnp.floor(position)
            time = lambda i: grid_time(self.t0, self.t1, self.substeps, i)
        else:
            fractions, side = self.fractions, "left" if left else "right"
            method = "scan_unrolled"
            index = jnp.searchsorted(fractions, fraction, side=side, method=method) - 1
            time = lambda i: time_at(self.t0, self.t1, fractions[i])
        index = jnp.clip(index, 0, self.substeps - 1).astype(jnp.int32)
        t0, t1 = time(index), time(index + 1)
        dense_info = jtu.tree_map(lambda x: x[index], self.dense_infos)
        return self.interpolation_cls(t0=t0, t1=t1, **dense_info).evaluate(t, left=left)


# A dataclass rather than a closure or a `functools.partial`, as Diffrax stores this as
# static information, which JAX then compares.
@dataclasses.dataclass(frozen=True)
class WindowInterpolationFactory:
    interpolation_cls: Callable[..., AbstractLocalInterpolation]
    substeps: int

    def __call__(self, *, t0, t1, dense_infos, fractions=None) -> WindowInterpolation:
        return WindowInterpolation(
            t0=t0,
            t1=t1,
            dense_infos=dense_infos,
            fractions=fractions,
            substeps=self.substeps,
            interpolation_cls=self.interpolation_cls,
        )
