"""What gets from one window to the next: a step of a solver, or many of them."""

import abc
import dataclasses
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractLocalInterpolation, AbstractSolver, RESULTS
from equinox import AbstractVar
from jaxtyping import Array, Int, Real

from .._custom_types import IntScalarLike, PyTree
from .._iterate import solve_in_turn
from .._method import DEER
from .._scan import AutoScan
from .._solver import DeerSolver, SolvedWindow
from .._state import DeerState
from .._window import (
    controls,
    Discretisation,
    Iterate,
    Scheme,
    uniform_steps,
    with_controls,
)
from .times import advance, KnownTimes, last_of
from .trajectory import Linearisation


# Of a sequential solver, how many steps are differentiated at once on GPUs, and how
# many stages there are in these on CPUs.
_CHUNK = 128
_STAGES_IN_CHUNK = 24
# Of how many steps at known times to evaluate the controls at once.
_BLOCK = 256


class Made(eqx.Module):
    """What an attempt at a window has led to. `fractions` are `None` if all steps of
    `solver` are divided equally. `interpolation` is that of a window which is a single
    step of `solver`, and `None` for all others."""

    t0s: Real[Array, " size"]
    t1s: Real[Array, " size"]
    fractions: Real[Array, " size_plus_1"] | None
    y1: PyTree[Array]
    y_error: PyTree[Array] | None
    at: Iterate
    solver_state: PyTree[Any]
    result: RESULTS
    num_iterations: IntScalarLike
    span: IntScalarLike
    interpolation: AbstractLocalInterpolation | None = None


class AbstractStepper(eqx.Module):
    """Makes one window after the other.

    **Attributes:**

    - `solver`: what the user has passed to `diffeqsolve`.
    """

    solver: AbstractVar[AbstractSolver]

    @property
    @abc.abstractmethod
    def substeps(self) -> int:
        """How many of them each step of `solver` consists of."""

    @property
    @abc.abstractmethod
    def steps(self) -> int:
        """How many steps of `solver` each window consists of."""

    @property
    def size(self) -> int:
        """The number of substeps of a window."""
        return self.steps * self.substeps

    @property
    @abc.abstractmethod
    def linearisation(self) -> Linearisation:
        """How windows are differentiated by their equations."""

    @property
    @abc.abstractmethod
    def chosen_by(self) -> Any:
        """The step size controller that chooses the windows."""

    @abc.abstractmethod
    def chunk(self, scheme: Scheme, max_windows: int) -> int:
        """How many substeps to differentiate at once. Windows consist of such chunks,
        or these of windows."""

    @abc.abstractmethod
    def init(
        self, scheme: Scheme, solver_state: Any, controller_state: Any, tnext: Any
    ) -> tuple[Any, Any, Any]:
        """What to begin with, where Diffrax would begin with these."""

    @abc.abstractmethod
    def make(
        self,
        scheme: Scheme,
        index: IntScalarLike,
        t0: Real[Array, ""],
        t1: Real[Array, ""],
        y0: PyTree[Array],
        solver_state: Any,
        made_jump: Any,
    ) -> Made:
        """Attempts the window with this index."""

    @abc.abstractmethod
    def num_steps(self, num_windows: Int[Array, ""]) -> Int[Array, ""]:
        """How many steps of `solver` have been made in so many windows."""

    @abc.abstractmethod
    def end(self, init_state: Any, final_state: Any, num_steps: Int[Array, ""]) -> Any:
        """What Diffrax would have ended with after so many steps, given what it began
        with, and what the windows have ended with."""

    @property
    def is_uniform(self) -> bool:
        """Whether all steps of `solver` are divided into substeps of equal length."""
        return True

    @abc.abstractmethod
    def grouped(
        self,
        dense_infos: PyTree[Array],
        fractions: Real[Array, "windows substeps_plus_1"] | None,
    ) -> PyTree[Array]:
        """What Diffrax calls the dense information, given that of all substeps."""


class AbstractSteps(AbstractStepper):
    """Every step of any one-step method is a window."""

    controller: AbstractVar[Any]
    max_chunk: AbstractVar[int | None]

    @property
    def substeps(self) -> int:
        return 1

    @property
    def steps(self) -> int:
        return 1

    @property
    def linearisation(self) -> Linearisation:
        again = lambda problem: problem.window.sequential()
        return Linearisation(DEER(), AutoScan(), None, again)

    @property
    def chosen_by(self) -> Any:
        return self.controller

    def num_steps(self, num_windows: Int[Array, ""]) -> Int[Array, ""]:
        return num_windows

    def chunk(self, scheme: Scheme, max_windows: int) -> int:
        if self.max_chunk is not None:
            chunk = self.max_chunk
        elif jax.default_backend() == "cpu":
            chunk = -(-_STAGES_IN_CHUNK // scheme.span)
        else:
            chunk = _CHUNK
        return min(chunk, max_windows)

    def step(self, scheme, terms, t0, t1, y0, solver_state, made_jump) -> Made:
        """By the solver."""
        y1, y_error, dense_info, state, result = self.solver.step(
            terms, t0, t1, y0, scheme.args, solver_state, made_jump
        )
        ks = scheme.stages(t0, t1, y0, y1, dense_info)
        return Made(
            t0s=t0[None],
            t1s=t1[None],
            fractions=None,
            y1=y1,
            y_error=y_error,
            at=Iterate(scheme.ravel(y1)[None], ks[None]),
            solver_state=state,
            result=result,
            num_iterations=0,
            span=scheme.span,
            interpolation=scheme.interpolation(t0, t1, dense_info),
        )

    def grouped(self, dense_infos, fractions):
        del fractions
        return dense_infos


class SequentialSteps(AbstractSteps):
    """Steps at times that are chosen one after the other."""

    solver: AbstractSolver
    controller: Any
    max_chunk: int | None = eqx.field(static=True)

    def init(self, scheme, solver_state, controller_state, tnext):
        del scheme
        return solver_state, controller_state, tnext

    def make(self, scheme, index, t0, t1, y0, solver_state, made_jump) -> Made:
        del index
        return self.step(scheme, scheme.terms, t0, t1, y0, solver_state, made_jump)

    def end(self, init_state, final_state, num_steps):
        del init_state, num_steps
        return final_state


class KnownSteps(AbstractSteps):
    """Steps at times that are known beforehand. The controls of many are evaluated at
    once."""

    solver: AbstractSolver
    controller: Any
    max_chunk: int | None = eqx.field(static=True)
    times: KnownTimes

    def init(self, scheme, solver_state, controller_state, tnext):
        # Nothing yet.
        like = jax.eval_shape(lambda: self._block(scheme, jnp.array(0, jnp.int32)))
        block = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        return (solver_state, block), controller_state, tnext

    def make(self, scheme, index, t0, t1, y0, solver_state, made_jump) -> Made:
        del t0, t1
        state, block = solver_state
        place = index % _BLOCK
        # In a batch, of all or of none.
        block = lax.cond(
            eqxi.unvmap_any(place == 0),
            lambda: self._block(scheme, index - place),
            lambda: block,
        )
        t0, t1, controls = jtu.tree_map(lambda x: x[place], block)
        terms = with_controls(scheme.terms, self._kwargs, t0, t1, controls)
        made = self.step(scheme, terms, t0, t1, y0, state, made_jump)
        return dataclasses.replace(made, solver_state=(made.solver_state, block))

    def end(self, init_state, final_state, num_steps):
        del init_state, num_steps
        solver_state, _ = final_state.solver_state
        return dataclasses.replace(final_state, solver_state=solver_state)

    def _block(self, scheme, first):
        """When steps begin and end, and their controls."""
        ts = self.times.starts(first + jnp.arange(_BLOCK + 1, dtype=jnp.int32))
        t0s, t1s = ts[:-1], ts[1:]
        return t0s, t1s, controls(scheme.terms, self._kwargs, t0s, t1s)

    @property
    def _kwargs(self):
        return self.solver.term_compatible_contr_kwargs


class AbstractWindows(AbstractStepper):
    """The windows of a `DeerSolver`."""

    solver: AbstractVar[DeerSolver]

    @property
    def substeps(self) -> int:
        return self.solver.substeps

    @property
    def linearisation(self) -> Linearisation:
        solver, again = self.solver, eqx.Partial(_solve_again, self.solver)
        return Linearisation(solver.method, solver.scan, solver.sharding, again)

    def chunk(self, scheme: Scheme, max_windows: int) -> int:
        del scheme, max_windows
        return self.size

    def grouped(self, dense_infos, fractions):
        def split(x):
            number = len(x) // self.substeps
            return x.reshape(number, self.substeps, *x.shape[1:])

        dense_info = dict(dense_infos=jtu.tree_map(split, dense_infos))
        return (
            dense_info if fractions is None else dense_info | dict(fractions=fractions)
        )


class Windows(AbstractWindows):
    """Every step of a `DeerSolver` is a window."""

    solver: DeerSolver
    controller: Any

    @property
    def steps(self) -> int:
        return 1

    @property
    def chosen_by(self) -> Any:
        return self.controller

    def init(self, scheme, solver_state, controller_state, tnext):
        del scheme
        return solver_state, controller_state, tnext

    def make(self, scheme, index, t0, t1, y0, solver_state, made_jump) -> Made:
        del index, made_jump
        solved = self.solver.solve_window(
            scheme.terms, t0, t1, y0, scheme.args, solver_state
        )
        interpolation = self.solver.interpolation_cls(t0=t0, t1=t1, **solved.dense_info)
        return _made(solved, interpolation)

    def num_steps(self, num_windows: Int[Array, ""]) -> Int[Array, ""]:
        return num_windows

    def end(self, init_state, final_state, num_steps):
        del init_state, num_steps
        return final_state

    @property
    def is_uniform(self) -> bool:
        return self.solver.grid.is_uniform


class MergedWindows(AbstractWindows):
    """Every window consists of many steps of a `DeerSolver`, at times that are known
    beforehand."""

    solver: DeerSolver
    times: KnownTimes
    steps_per_window: int = eqx.field(static=True)

    @property
    def steps(self) -> int:
        return self.steps_per_window

    @property
    def chosen_by(self) -> Any:
        return _KnownWindows(self.times, self.steps)

    def init(self, scheme, solver_state, controller_state, tnext):
        del scheme, controller_state, tnext
        # The trajectory is not used as a guess: there is no window twice.
        longer = lambda x: jnp.zeros((self.size, *x.shape[1:]), x.dtype)
        ys = jtu.tree_map(longer, solver_state.ys)
        solver_state = dataclasses.replace(solver_state, ys=ys)
        one = jnp.array(1, jnp.int32)
        return solver_state, one, self.times.starts(self.steps * one)

    def make(self, scheme, index, t0, t1, y0, solver_state, made_jump) -> Made:
        del t0, t1, solver_state, made_jump
        steps = jnp.arange(self.steps + 1, dtype=jnp.int32)
        ts = self.times.starts(jnp.asarray(index) * self.steps + steps)
        grid = eqx.filter_vmap(uniform_steps, in_axes=(0, 0, None))(
            ts[:-1], ts[1:], self.substeps
        )
        grid = (x.reshape(-1) for x in grid)
        return _made(
            self.solver.solve_on(scheme.terms, *grid, y0, scheme.args, scheme.reads)
        )

    def num_steps(self, num_windows: Int[Array, ""]) -> Int[Array, ""]:
        # The last window may extend beyond the end, by steps of length zero.
        before = self.steps * jnp.maximum(num_windows - 1, 0)
        t0s, t1s = self.times(before + jnp.arange(self.steps, dtype=jnp.int32))
        made = before + jnp.sum(t0s < t1s, dtype=jnp.int32)
        return jnp.where(num_windows == 0, 0, made)

    def end(self, init_state, final_state, num_steps):
        last, solver_state = last_of(num_steps), final_state.solver_state

        def last_step(ys):
            index = (last % self.steps) * self.substeps
            return lax.dynamic_slice_in_dim(ys, index, self.substeps)

        times = self.times
        t0, t1 = times(last)
        new_state = DeerState(
            t0=t0,
            t1=t1,
            ys=jtu.tree_map(last_step, solver_state.ys),
            num_iterations=solver_state.num_iterations,
            sequential_evaluations=solver_state.sequential_evaluations,
        )
        new_state = jtu.tree_map(
            lambda x, y: jnp.where(num_steps == 0, x, y),
            init_state.solver_state,
            new_state,
        )
        controller_state = advance(times.controller, times.controller_state, num_steps)
        return dataclasses.replace(
            final_state,
            solver_state=lax.stop_gradient(new_state),
            controller_state=lax.stop_gradient(controller_state),
            num_steps=num_steps,
            num_accepted_steps=num_steps,
        )


def _solve_again(solver: DeerSolver, problem: Discretisation) -> Iterate:
    """One substep after the other."""
    solution = solve_in_turn(solver.iteration(problem))
    # It has been solved before, so this can only be a mistake, which must be seen.
    okay = solution.result == RESULTS.successful
    return jtu.tree_map(lambda x: jnp.where(okay, x, jnp.nan), solution.at)


def _made(
    solved: SolvedWindow, interpolation: AbstractLocalInterpolation | None = None
) -> Made:
    state = solved.state
    return Made(
        t0s=solved.problem.t0s,
        t1s=solved.problem.t1s,
        fractions=state.fractions,
        y1=solved.y1,
        y_error=solved.y_error,
        at=solved.whole.at,
        solver_state=state,
        result=solved.result,
        num_iterations=state.num_iterations,
        span=state.sequential_evaluations,
        interpolation=interpolation,
    )


class _KnownWindows(eqx.Module):
    times: KnownTimes
    steps: int = eqx.field(static=True)

    def adapt_step_size(self, t0, t1, y0, y1, args, y_error, error_order, state):
        del t0, y0, y1, args, y_error, error_order
        tnext = self.times.starts((state + 1) * self.steps)
        return True, t1, tnext, False, state + 1, RESULTS.successful
