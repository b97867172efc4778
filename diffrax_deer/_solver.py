from collections.abc import Callable
from dataclasses import KW_ONLY

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from diffrax import (
    AbstractSolver,
    AbstractTerm,
    AbstractWrappedSolver,
    RESULTS,
    Tsit5,
)
from jaxtyping import Array, Float, PyTree, Real

from ._checks import (
    check_instance,
    check_one_step_solver,
    check_positive_int,
    check_state,
    check_tolerance,
    check_trajectory,
)
from ._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, VF, Y
from ._guess import AbstractGuess, AutoGuess
from ._interpolation import uniform_grid, WindowInterpolationFactory
from ._joint import Iteration, joint_solve
from ._method import AbstractMethod, DEER
from ._scan import AbstractScan, AutoScan
from ._state import DeerState
from ._step import OneStepMap
from ._window import Window


class DeerSolver(AbstractWrappedSolver[DeerState]):
    r"""Solves many steps of another solver jointly, in parallel over time.

    Each step of `DeerSolver` is a *window*: it is split into `substeps` equal parts,
    over which the wrapped solver makes one step each. All of these are found at once,
    by an iteration whose every pass evaluates the vector field at all of them in
    parallel, and solves a linear recurrence between them.

    - The solution is that of the wrapped solver on the same grid, up to the tolerance
        of this iteration. So are its order of convergence, stability, dense output, and
        whether it converges to the Itô or the Stratonovich solution.
    - `dt0` and `stepsize_controller` choose the windows. An adaptive controller sees
        the error accumulated over the window, and finds windows that are both accurate
        enough and easy enough to be solved jointly. With `dt0 = t1 - t0` and constant
        steps, the whole differential equation is a single window.
    - A window on which the iteration fails has an infinite error estimate. So an
        adaptive step size controller will try again with a smaller one, whilst with
        constant steps `diffeqsolve` reports the failure.
    - Derivatives are obtained from the implicit function theorem, in any mode and of
        any order that `diffeqsolve(..., adjoint=...)` supports. They are those of the
        wrapped solver.
    - With [`diffrax_deer.DeerAdjoint`][], saving, backpropagation and events are also
        parallel over time. With any other adjoint, events are looked for at the ends of
        windows. Then a boolean event ends the solve at the end of the window in which
        it becomes true, and of a floating event which changes sign twice within one
        window neither change is seen.
    - `SaveAt(steps=True)` saves the ends of windows. `SaveAt(dense=True)` keeps all
        substeps of all windows, for which it allocates `max_steps * substeps` of what
        the wrapped solver would keep for one step. So set `max_steps` to the number of
        windows needed.
    - The vector field must be differentiable in forward mode, even if no derivative is
        asked for. (A `jax.custom_vjp` is not. Neither is another `diffeqsolve`, unless
        with `adjoint=DirectAdjoint()` or `adjoint=ForwardMode()`.) It is also evaluated
        at guesses, which may be far from the solution.

    The wrapped solver may be any one-step method of Diffrax. Explicit Runge--Kutta
    methods are the fastest choice.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{lim2024parallelizing,
            author={Lim, Yi Heng and Zhu, Qi and Selfridge, Joshua and
                    Kasim, Muhammad Firmansyah},
            title={Parallelizing non-linear sequential models over the sequence length},
            booktitle={International Conference on Learning Representations},
            year={2024},
        }
        ```
    """

    solver: AbstractSolver = Tsit5()
    substeps: int = eqx.field(default=64, static=True)
    _: KW_ONLY
    method: AbstractMethod = DEER()
    scan: AbstractScan = AutoScan()
    guess: AbstractGuess = AutoGuess()
    rtol: RealScalarLike | None = None
    atol: RealScalarLike | None = None
    norm: Callable[[PyTree], RealScalarLike] = optx.max_norm
    max_iters: int | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        check_one_step_solver(self.solver, "DeerSolver(solver=...)")
        if isinstance(self.solver, DeerSolver):
            raise ValueError(
                "`DeerSolver(solver=...)` cannot be another `DeerSolver`. Wrap the "
                "innermost solver directly, and multiply the numbers of `substeps`."
            )
        check_positive_int(self.substeps, "DeerSolver(substeps=...)")
        check_instance(self.method, AbstractMethod, "DeerSolver(method=...)")
        check_instance(self.scan, AbstractScan, "DeerSolver(scan=...)")
        check_instance(self.guess, AbstractGuess, "DeerSolver(guess=...)")
        if self.rtol is not None:
            check_tolerance(self.rtol, "DeerSolver(rtol=...)")
        if self.atol is not None:
            check_tolerance(self.atol, "DeerSolver(atol=...)")
        if not callable(self.norm):
            raise TypeError(
                "`DeerSolver(norm=...)` must be a function `PyTree -> Scalar`, for "
                f"example `optimistix.max_norm`, got {self.norm!r}."
            )
        if self.max_iters is not None:
            check_positive_int(self.max_iters, "DeerSolver(max_iters=...)")

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def interpolation_cls(self):  # pyright: ignore
        return WindowInterpolationFactory(self.solver.interpolation_cls, self.substeps)

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    # As `isinstance` checks are forwarded to the wrapped solver, so must be the
    # attributes that Diffrax then expects.

    @property
    def scan_kind(self):
        return self.solver.scan_kind  # pyright: ignore

    @property
    def root_finder(self):
        return self.solver.root_finder  # pyright: ignore

    @property
    def root_find_max_steps(self):
        return self.solver.root_find_max_steps  # pyright: ignore

    def order(self, terms: PyTree[AbstractTerm]) -> int | None:
        return self.solver.order(terms)

    def strong_order(self, terms: PyTree[AbstractTerm]) -> RealScalarLike | None:
        return self.solver.strong_order(terms)

    def error_order(self, terms: PyTree[AbstractTerm]) -> RealScalarLike | None:
        return self.solver.error_order(terms)

    def func(
        self, terms: PyTree[AbstractTerm], t0: RealScalarLike, y0: Y, args: Args
    ) -> VF:
        return self.solver.func(terms, t0, y0, args)

    def init(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> DeerState:
        del terms, t1, args
        # Equal to the times of no window.
        never = jnp.full_like(t0, jnp.nan)
        return DeerState(
            never, never, self._zero_trajectory(y0), jnp.array(0, jnp.int32)
        )

    def step(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: DeerState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y | None, DenseInfo, DeerState, RESULTS]:
        del made_jump
        check_state(y0, "y0")
        self._check_solver_state(solver_state, y0)
        ts = uniform_grid(t0, t1, self.substeps)
        return self.solve_window(terms, ts, y0, args, solver_state)

    def solve_window(
        self,
        terms: PyTree[AbstractTerm],
        ts: Real[Array, " substeps_plus_1"],
        y0: Y,
        args: Args,
        solver_state: DeerState | None,
    ) -> tuple[Y, Y | None, DenseInfo, DeerState, RESULTS]:
        """As `step`, but on any grid, which also may have any number of substeps."""
        window, iteration, guess = self.prepare(terms, ts, y0, args, solver_state)
        step = window.step
        solution = joint_solve(iteration, guess)
        ys = solution.ys
        starts = window.starts(ys)
        substeps = window.substeps(starts)

        # An implicit solver may also have failed on one of the substeps.
        failed = substeps.result != RESULTS.successful
        result = jtu.tree_map(lambda x: x[jnp.argmax(failed)], substeps.result)
        joint_okay = solution.result == RESULTS.successful
        result = RESULTS.where(joint_okay, result, solution.result)
        okay = result == RESULTS.successful

        # Step size controllers divide the error by the solution, which so has to be
        # finite also when the error is not.
        y1 = step.unravel(jnp.where(okay, ys[-1], window.y0))
        if substeps.y_error is None:
            y_error = None
        else:
            errors = window.ravel_all(substeps.y_error)
            y_error = self._window_error(errors, starts, ys, solution.A)
            y_error = lax.stop_gradient(y_error)
            y_error = step.unravel(jnp.where(okay, y_error, jnp.inf))
        dense_info = dict(dense_infos=substeps.dense_info)
        new_solver_state = DeerState(
            t0=ts[0],
            t1=ts[-1],
            ys=lax.stop_gradient(window.unravel_all(ys)),
            num_iterations=solution.num_iterations,
        )
        return y1, y_error, dense_info, new_solver_state, result

    def prepare(
        self,
        terms: PyTree[AbstractTerm],
        ts: Real[Array, " substeps_plus_1"],
        y0: Y,
        args: Args,
        solver_state: DeerState | None,
    ) -> tuple[Window, Iteration, Callable[[], Float[Array, "substeps size"]]]:
        """A window, the iteration that solves it, and what that begins with."""
        step = OneStepMap(self.solver, terms, y0, args)
        window = Window(step=step, ts=ts, y0=step.ravel(y0))

        def cold():
            ys = self.guess(self.solver, terms, ts, y0, args, solver_state)
            substeps = ts.shape[0] - 1
            message = (
                "`DeerSolver(guess=...)` must return a PyTree like `y0`, with an "
                f"additional leading axis for the {substeps} substeps of the window on "
                f"every leaf, but `{type(self.guess).__name__}` does not."
            )
            check_trajectory(ys, y0, substeps, message)
            return ys

        def guess():
            if solver_state is None:
                ys = cold()
            else:
                warm_ys = solver_state.ys
                same_window = (solver_state.t0 == ts[0]) & (solver_state.t1 == ts[-1])
                ys = lax.cond(same_window, lambda: warm_ys, cold)
            return window.finite(window.ravel_all(ys))

        iteration = Iteration(
            window=window,
            method=self.method,
            scan=self.scan,
            rtol=self.rtol,
            atol=self.atol,
            norm=self.norm,
            max_iters=ts.shape[0] - 1 if self.max_iters is None else self.max_iters,
        )
        return window, iteration, guess

    def _window_error(self, errors, starts, ys, A):
        # What the errors made on each substep have become at the end of the window.
        at_end = jnp.abs(self.scan(A, errors)[-1])
        # That alone would miss it if an explicit solver is unstable on one part of the
        # window, and the difference to the true solution is then damped on another. So
        # also ask of each substep what the controller would ask of a single step. It
        # compares with the values at the ends of the window, hence the rescaling where
        # the solution is larger in between.
        size_at_ends = jnp.maximum(jnp.abs(starts[:1]), jnp.abs(ys[-1:]))
        size = jnp.maximum(jnp.abs(starts), jnp.abs(ys))
        rescale = jnp.where(size > size_at_ends, size_at_ends / size, 1)
        return jnp.maximum(at_end, jnp.max(jnp.abs(errors) * rescale, axis=0))

    def _zero_trajectory(self, y0):
        return jtu.tree_map(
            lambda y: jnp.zeros((self.substeps, *jnp.shape(y)), jnp.result_type(y)), y0
        )

    def _check_solver_state(self, solver_state, y0):
        expected = jax.eval_shape(lambda: self._zero_trajectory(y0))
        if isinstance(solver_state, DeerState):
            actual = jax.eval_shape(lambda: solver_state.ys)
            if eqx.tree_equal(actual, expected) is True:
                return
        raise ValueError(
            "`diffeqsolve(..., solver_state=...)` does not belong to this solve. "
            "`DeerSolver` needs a state saved with `SaveAt(solver_state=True)` by a "
            "`DeerSolver` with the same number of `substeps`, for a `y0` of the same "
            f"shape and dtype. Expected a trajectory of the form\n{expected}\n"
            f"but got the state\n{solver_state}"
        )


DeerSolver.__init__.__doc__ = """**Arguments:**

- `solver`: the solver to wrap, which makes every substep. Any one-step method.
- `substeps`: the number of steps that each window is split into. A positive integer.
    With `substeps=1` this is the wrapped solver.
- `method`: how the substeps are linearised. See [`diffrax_deer.AbstractMethod`][].
- `scan`: how the linear recurrence between the substeps is evaluated. See
    [`diffrax_deer.AbstractScan`][]. Defaults to whatever suits the platform on which
    the computation is going to run.
- `guess`: the first guess of the trajectory over each window. See
    [`diffrax_deer.AbstractGuess`][]. Defaults to whatever suits the platform on which
    the computation is going to run. If the `solver_state` passed to `diffeqsolve` is
    that of a window from exactly the same `t0` to exactly the same `t1`, then its
    trajectory is the first guess instead.
- `rtol`, `atol`: the iteration ends once the trajectory is as close to that of the
    wrapped solver as a tenth of `atol + rtol * abs(value)`, judging by how quickly it
    converges. This has nothing to do with the accuracy of the wrapped solver. Where
    rounding errors alone are larger than that, the iteration ends when they are all
    that is left. `rtol` defaults to 1e-10 in double precision and to 5e-6 in single
    precision (the lowest precision of all leaves of the state). `atol` defaults to
    `0.01 * rtol`, or to as much less as the largest value is less than 1.
- `norm`: a function `PyTree -> Scalar` that says how large a change is, relative to the
    tolerances. It is called with an array of shape `(substeps, size of the state)`.
- `max_iters`: the maximum number of iterations for each window. A positive integer. If
    more would be needed then the window fails. Defaults to `substeps`, which always
    suffices if the solution is finite.
"""
