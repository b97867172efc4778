"""When steps begin and end, and what that depends on."""

import abc
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import (
    AbstractStepSizeController,
    ClipStepSizeController,
    ConstantStepSize,
    StepTo,
)
from jaxtyping import Array, Int, Real

from .._custom_types import IntScalarLike, PyTree, RealScalarLike
from .._time_axis import place_in
from .._window import grid_time, time_at


class AbstractTimes(eqx.Module):
    """The times of steps, as functions of what the user has passed."""

    @abc.abstractmethod
    def __call__(self, index: Int[Array, "*shape"]) -> tuple[Array, Array]:
        """When the steps with these indices begin and end."""

    @property
    @abc.abstractmethod
    def rows(self) -> PyTree[Array]:
        """What is stored of each step, with a leading axis for these."""

    @abc.abstractmethod
    def part(self, first: Int[Array, ""], rows: PyTree[Array]) -> "AbstractTimes":
        """The same, where `rows` are those from this step on, and no others matter."""


class KnownTimes(AbstractTimes):
    """Those of a controller that knows them in advance. After `max_steps`, or once `t1`
    has been reached, steps of length zero follow."""

    controller: AbstractStepSizeController
    # Before the first step has been made.
    controller_state: PyTree[Any]
    t0: Real[Array, ""]
    tnext: Real[Array, ""]
    t1: Real[Array, ""]
    dt0: RealScalarLike | None
    max_steps: int | None = eqx.field(static=True)

    def __call__(self, index):
        return self.starts(index), self.starts(index + 1)

    @property
    def rows(self):
        return None

    def part(self, first, rows):
        del first, rows
        return self

    def starts(self, index: Int[Array, "*shape"]) -> Real[Array, "*shape"]:
        if self.max_steps is not None:
            index = jnp.minimum(index, self.max_steps)
        ts = jnp.vectorize(self._later)(index)
        ts = jnp.where(index == 0, self.t0, jnp.where(index == 1, self.tnext, ts))
        is_end = (ts > almost(self.t1)) | (ts >= self.t1)
        return jnp.where(is_end, self.t1, ts)

    def _later(self, n):
        dtype = jnp.result_type(self.t0)
        # Only used without an end: then steps are added up.
        previous = self.t0
        if self.dt0 is not None:
            previous = self.t0 + (n - 1).astype(dtype) * self.dt0
        state = advance(self.controller, self.controller_state, n - 2)
        # If there is no step, then any will do that can be differentiated.
        is_nothing = self.t0 == self.t1
        state = jtu.tree_map(lambda x: jnp.where(is_nothing, 1, x), state)
        # No controller of this kind looks at any of what is missing.
        unused: Any = None
        _, _, end, _, _, _ = self.controller.adapt_step_size(
            previous, previous, unused, unused, unused, unused, unused, state
        )
        return jnp.asarray(end, dtype)


class ChosenTimes(AbstractTimes):
    """Times that a controller has chosen. Those that equal one of the `anchors`, up to
    a rounding error, move with that one, and all others are constants."""

    t0s: Real[Array, " steps"]
    t1s: Real[Array, " steps"]
    anchors: list[Real[Array, "..."]]
    # With which of the steps these begin.
    first: IntScalarLike = 0

    def __call__(self, index):
        index = jnp.maximum(index - self.first, 0)
        return self._moved(self.t0s[index]), self._moved(self.t1s[index])

    @property
    def rows(self):
        return self.t0s, self.t1s

    def part(self, first, rows):
        t0s, t1s = rows
        return ChosenTimes(t0s, t1s, self.anchors, first)

    def _moved(self, ts):
        ts = lax.stop_gradient(ts)
        moving = jnp.sort(jnp.concatenate([jnp.ravel(x) for x in self.anchors]))
        fixed = lax.stop_gradient(moving)
        right = jnp.clip(place_in(fixed, ts), 1, len(moving) - 1)
        left = right - 1
        nearest = jnp.where(ts - fixed[left] < fixed[right] - ts, left, right)
        # Jumps are stepped over, from the floating point number before to the one
        # after.
        same = jnp.abs(ts - fixed[nearest]) <= 2 * jnp.spacing(jnp.abs(ts))
        same = same & jnp.isfinite(fixed[nearest])
        return ts + jnp.where(same, moving[nearest] - fixed[nearest], 0)


def almost(t1: RealScalarLike) -> Real[Array, ""]:
    """Steps that would end later end at `t1`. As in `diffeqsolve`, which thus avoids
    tiny steps at the end."""
    t1 = lax.stop_gradient(jnp.asarray(t1))
    return t1 - 100 * (t1 - eqxi.prevbefore(t1))


def anchors(controller: AbstractStepSizeController) -> list[Array]:
    """The times that steps are made to end at, which so may be differentiated."""
    if isinstance(controller, ClipStepSizeController):
        ts = [controller.step_ts, controller.jump_ts]
        ts = [x for x in ts if x is not None]
        return [*ts, *anchors(controller.controller)]
    else:
        return []


def are_known(controller: AbstractStepSizeController) -> bool:
    """Whether a step size controller knows all of its steps in advance."""
    return type(controller) in (ConstantStepSize, StepTo)


def advance(
    controller: AbstractStepSizeController, state: PyTree[Any], steps: IntScalarLike
) -> PyTree[Any]:
    """The state of such a controller after some more steps."""
    if type(controller) is ConstantStepSize:
        steps_completed, *fixed = state
        return (steps_completed + steps, *fixed)
    else:
        return state + steps


class SubstepTimes(eqx.Module):
    """When all substeps begin and end.

    **Attributes:**

    - `times`: when steps do.
    - `fractions`: when the substeps of these do. `None` if they are equally long.
    - `per_step`: how many of them are a step.
    """

    times: AbstractTimes
    fractions: Real[Array, "steps substeps_plus_1"] | None
    per_step: int = eqx.field(static=True)
    # With which of the steps `fractions` begin.
    first: IntScalarLike = 0

    def __call__(
        self, index: Int[Array, "*shape"], number: Int[Array, ""]
    ) -> tuple[Array, Array]:
        """If there are this many. All others have length zero."""
        n = self.per_step
        step, substep = jnp.divmod(jnp.minimum(index, last_of(number)), n)
        t0, t1 = self.times(step)
        if self.fractions is not None:
            row = jnp.maximum(step - self.first, 0)
            fractions = (self.fractions[row, i] for i in (substep, substep + 1))
            t0, t1 = (time_at(t0, t1, fraction) for fraction in fractions)
        elif n > 1:
            t0, t1 = (grid_time(t0, t1, n, i) for i in (substep, substep + 1))
        return jnp.where(index < number, t0, t1), t1

    def split(self, number: Int[Array, ""], chunks: int, per_chunk: int):
        """What is stored of the steps of each chunk, of so many substeps. Behind the
        last step that is what is stored of this one."""
        steps = per_chunk // self.per_step
        last = last_of(number) // self.per_step
        index = jnp.arange(chunks * steps, dtype=jnp.int32)

        def rows(x):
            padding = [(0, len(index) - len(x))] + [(0, 0)] * (x.ndim - 1)
            x = jnp.where(
                jnp.expand_dims(index <= last, range(1, x.ndim)),
                jnp.pad(x, padding),
                x[last],
            )
            return x.reshape(chunks, steps, *x.shape[1:])

        return jtu.tree_map(rows, lax.stop_gradient((self.times.rows, self.fractions)))

    def part(self, first: Int[Array, ""], rows: PyTree[Array]) -> "SubstepTimes":
        """The same, where `rows` are those from this substep on, with which a step
        begins, and no others matter."""
        step = first // self.per_step
        of_times, fractions = rows
        return SubstepTimes(
            self.times.part(step, of_times), fractions, self.per_step, step
        )


def last_of(number: Int[Array, ""]) -> Int[Array, ""]:
    return jnp.maximum(number, 1) - 1
