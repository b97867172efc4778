import dataclasses
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from diffrax import (
    AbstractSolver,
    Dopri8,
    RESULTS,
)
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Real

from ._checks import (
    check_instance,
    check_one_step_solver,
    check_optional_int,
    check_positive_int,
    check_sharding,
    check_state,
    check_tolerance,
)
from ._collocation import AbstractCollocation
from ._custom_types import (
    Args,
    BoolScalarLike,
    DenseInfo,
    IntScalarLike,
    PyTree,
    RealScalarLike,
    Terms,
    Y,
)
from ._error import accumulated_error, error_by_halving
from ._failure import NONFINITE
from ._forwarding import AbstractForwardingSolver
from ._grid import AbstractGrid, Placed, UniformGrid
from ._guess import AbstractGuess, AutoGuess
from ._implicit import with_derivative, without_gradient
from ._iterate import Iteration, JointSolution, solve_in_turn
from ._method import AbstractMethod, DEER
from ._scan import AbstractScan, AutoScan
from ._state import DeerState
from ._time_axis import divided
from ._window import (
    Discretisation,
    interpolation_of,
    is_finite,
    Iterate,
    leaves_read,
    Scheme,
    Split,
    tableau_of,
    time_at,
    uniform_steps,
    Whole,
    WindowInterpolationFactory,
)


_NO_ROOT_FINDER = optx.Newton(rtol=0, atol=0)


class DeerSolver(AbstractForwardingSolver[DeerState]):
    r"""Solves many steps of another solver jointly, in parallel over time.

    Each step of `DeerSolver` is a *window*: it is split into `substeps` parts, over
    which the wrapped solver makes one step each. All of these are found at once,
    by an iteration whose every pass evaluates the vector field at all of them in
    parallel, and solves a linear recurrence between them. If the wrapped solver is a
    Runge--Kutta method, explicit or implicit, then this goes for all of its stages: a
    pass is two evaluations that follow one another, of the vector field and of its
    Jacobian, whatever the number of substeps and stages.

    - The solution is that of the wrapped solver on the same grid, up to the tolerance
        of this iteration. So are its order of convergence, stability, dense output, and
        whether it converges to the Itô or the Stratonovich solution.
    - `dt0` and `stepsize_controller` choose the windows. An adaptive controller sees
        what the error estimates of all substeps amount to, and finds windows that are
        both accurate enough and easy enough to be solved jointly. With `dt0 = t1 - t0`
        and constant steps, the whole differential equation is a single window.
    - A window on which the iteration fails has an infinite error estimate. So an
        adaptive step size controller will try again with a smaller one, whilst with
        constant steps `diffeqsolve` reports the failure.
    - Leaves of the state that the vector field does not read (a running cost, say, or a
        log-density) are not solved for but summed up, if the wrapped solver is a
        Runge--Kutta method.
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
        with `adjoint=DirectAdjoint()` or `adjoint=DeerAdjoint()`.) Only if no Jacobian
        is needed need it not be: with [`diffrax_deer.Jacobi`][] or
        [`diffrax_deer.Picard`][], or with an explicit solver and the default guess on
        a CPU. It is also evaluated at guesses, which may be far from the solution.

    The wrapped solver may be any one-step method of Diffrax, or one of
    [`diffrax_deer.GaussLegendre`][] and [`diffrax_deer.RadauIIA`][]. Of Runge--Kutta
    methods those of high order need the fewest substeps, and implicit ones need no root
    finder. Other methods (for SDEs, say) work as well, but are taken as a whole, so
    that the evaluations in one step of them follow one another in every pass.

    On a CPU, which gains nothing from doing more at once, the default `guess` is to
    solve one substep after the other: explicit ones are made, and an implicit one is
    iterated on until it is solved. (`DeerSolver(guess=ConstantGuess())` does what a GPU
    does.)

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

    solver: AbstractSolver[Any] = Dopri8()
    substeps: int = eqx.field(default=64, static=True)
    _: KW_ONLY
    method: AbstractMethod = DEER()
    scan: AbstractScan = AutoScan()
    guess: AbstractGuess = AutoGuess()
    grid: AbstractGrid = UniformGrid()
    rtol: RealScalarLike | None = None
    atol: RealScalarLike | None = None
    norm: Callable[[PyTree], RealScalarLike] = optx.max_norm
    max_iters: int | None = eqx.field(default=None, static=True)
    sharding: NamedSharding | None = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
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
        check_instance(self.grid, AbstractGrid, "DeerSolver(grid=...)")
        check_tolerance(self.rtol, "DeerSolver(rtol=...)")
        check_tolerance(self.atol, "DeerSolver(atol=...)")
        if not callable(self.norm):
            raise TypeError(
                "`DeerSolver(norm=...)` must be a function `PyTree -> Scalar`, for "
                f"example `optimistix.max_norm`, got {self.norm!r}."
            )
        check_optional_int(self.max_iters, "DeerSolver(max_iters=...)")
        if self.sharding is not None:
            name = "DeerSolver(sharding=...)"
            check_sharding(self.sharding, self.substeps, name)

    @property
    def interpolation_cls(self) -> Any:  # pyright: ignore
        return WindowInterpolationFactory(interpolation_of(self.solver), self.substeps)

    @property
    def root_finder(self) -> Any:
        # Without tolerances for it Diffrax refuses to go on. The substeps of a
        # Runge--Kutta method have no root finder, so this one is never used.
        has_none = tableau_of(self.solver) is not None
        return _NO_ROOT_FINDER if has_none else super().root_finder

    def error_order(self, terms: Terms) -> RealScalarLike | None:
        if self._estimates_by_halving:
            order = self.solver.order(terms)
            return None if order is None else order + 1
        return self.solver.error_order(terms)

    def init(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> DeerState:
        reads = self.leaves_read(terms, t0, t1, y0, args)
        # Equal to the times of no window.
        never, zero = jnp.full_like(t0, jnp.nan), jnp.array(0, jnp.int32)
        fractions, required_substeps = self.grid.init(self.substeps, never.dtype)
        return DeerState(
            t0=never,
            t1=never,
            ys=self._zero_trajectory(y0, reads),
            num_iterations=zero,
            sequential_evaluations=zero,
            fractions=fractions,
            required_substeps=required_substeps,
        )

    def step(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: DeerState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y | None, DenseInfo, DeerState, RESULTS]:
        del made_jump
        check_state(y0, "y0")
        return _step(self, terms, t0, t1, y0, args, solver_state)

    def solve_window(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: DeerState,
    ) -> "SolvedWindow":
        """On a grid of its own."""
        reads = self.leaves_read(terms, t0, t1, y0, args)
        self.check_solver_state(solver_state, y0, reads)
        t0s, t1s = self.equal_substeps(t0, t1)
        if solver_state.fractions is not None:
            is_same = (solver_state.t0 == t0) & (solver_state.t1 == t1)
            ts = time_at(t0, t1, solver_state.fractions)
            t0s, t1s = (jnp.where(is_same, *x) for x in ((ts[:-1], t0s), (ts[1:], t1s)))
        problem = self.problem(terms, t0s, t1s, y0, args, reads)
        return self._solve(problem, self.grid, solver_state)

    def equal_substeps(
        self, t0: RealScalarLike, t1: RealScalarLike
    ) -> tuple[Real[Array, " substeps"], Real[Array, " substeps"]]:
        """When those of a window begin and end."""
        return divided(uniform_steps(t0, t1, self.substeps), self.sharding)

    def problem(
        self,
        terms: Terms,
        t0s: Real[Array, " substeps"],
        t1s: Real[Array, " substeps"],
        y0: Y,
        args: Args,
        reads: tuple[bool, ...],
    ) -> Discretisation:
        """What is solved jointly, over any number of substeps."""
        scheme = Scheme(self.solver, terms, args, y0, reads)
        return Discretisation(scheme, t0s, t1s, self.sharding)

    def leaves_read(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> tuple[bool, ...]:
        """Which leaves of the state are unknowns."""
        everything = (True,) * len(jtu.tree_leaves(y0))
        inputs = terms, t0, t1, y0, args
        is_sequential = lambda: self.guess.is_sequential(
            self.uniform_problem(*inputs, everything)
        )
        return leaves_read(self.solver, *inputs, is_sequential)

    def uniform_problem(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        reads: tuple[bool, ...],
    ) -> Discretisation:
        """A window that is divided into equal substeps."""
        t0s, t1s = self.equal_substeps(t0, t1)
        return self.problem(terms, t0s, t1s, y0, args, reads)

    def solve_on(
        self,
        terms: Terms,
        t0s: Real[Array, " substeps"],
        t1s: Real[Array, " substeps"],
        y0: Y,
        args: Args,
        reads: tuple[bool, ...],
    ) -> "SolvedWindow":
        """On this grid, which may have any number of substeps."""
        problem = self.problem(terms, t0s, t1s, y0, args, reads)
        return self._solve(problem, UniformGrid(), None)

    def _solve(
        self,
        problem: Discretisation,
        grid: AbstractGrid,
        solver_state: DeerState | None,
    ) -> "SolvedWindow":
        placed = without_gradient(
            lambda: grid.place(
                problem,
                lambda problem: self.first_guess(problem, solver_state),
                self._solve_from,
            )
        )
        return self.solved(problem, placed)

    def solved(self, problem: Discretisation, placed: Placed) -> "SolvedWindow":
        """What follows from the solution."""
        if placed.fractions is not None:
            problem = problem.moved(placed.fractions)
        solution = with_derivative(placed.solution, self.iteration(problem))
        at, whole = solution.at, problem.whole(solution.at)
        outputs, unravel = problem.outputs(whole), problem.scheme.unravel

        # A solver may also have failed on one of the substeps.
        failed = jnp.atleast_1d(outputs.result != RESULTS.successful)
        result = jtu.tree_map(
            lambda x: jnp.atleast_1d(x)[jnp.argmax(failed)], outputs.result
        )
        joint_okay = solution.result == RESULTS.successful
        result = RESULTS.where(joint_okay, result, solution.result)
        if not problem.scheme.split.is_trivial:
            # What is not read, the iteration has not seen.
            is_new = (result == RESULTS.successful) & jnp.invert(is_finite(whole.y1))
            result = RESULTS.where(is_new, NONFINITE, result)
        okay = result == RESULTS.successful

        # Step size controllers divide the error by the solution, which so has to be
        # finite also when the error is not.
        y1 = unravel(jnp.where(okay, whole.y1, whole.y0))
        y_error = self._error(problem, whole, at, outputs.y_error)
        if y_error is not None:
            is_usable = okay & placed.is_accurate
            y_error = jnp.where(is_usable, lax.stop_gradient(y_error), jnp.inf)
            y_error = unravel(y_error)
        state = DeerState(
            t0=problem.t0s[0],
            t1=problem.t1s[-1],
            ys=lax.stop_gradient(problem.unravel_all(at.ys)),
            num_iterations=solution.num_iterations,
            sequential_evaluations=solution.span,
            fractions=placed.fractions,
            required_substeps=placed.required_substeps,
        )
        if placed.is_accurate is not True:
            too_few = okay & jnp.invert(placed.is_accurate)
            result = RESULTS.where(too_few, RESULTS.dt_min_reached, result)
        return SolvedWindow(
            *(problem, y1, y_error, outputs.dense_info, state, result, at, whole)
        )

    def iteration(self, problem: Discretisation) -> Iteration:
        """What solves a window."""
        return Iteration(
            window=problem.window,
            method=self.method,
            scan=self.scan,
            rtol=self.rtol,
            atol=self.atol,
            norm=self.norm,
            max_iters=self.max_iters,
        )

    def first_guess(
        self, problem: Discretisation, solver_state: DeerState | None
    ) -> tuple[Iterate, IntScalarLike]:
        """What the iteration begins with, and how many evaluations followed one
        another."""
        window = problem.window
        if self.guess.is_sequential(problem):
            return window.zeros(problem.substeps), jnp.array(0, jnp.int32)

        def cold():
            guess, span = self.guess(problem, solver_state, self._solve_roughly)
            self._check_guess(guess, problem)
            return guess, jnp.asarray(span, jnp.int32)

        if solver_state is None:
            guess, span = cold()
        else:
            t0, t1 = problem.t0s[0], problem.t1s[-1]
            same_window = (solver_state.t0 == t0) & (solver_state.t1 == t1)

            def warm():
                ys = problem.ravel_all(solver_state.ys)
                return window.interpolated(ys), jnp.array(0, jnp.int32)

            guess, span = lax.cond(same_window, warm, cold)
        return window.finite(guess), span

    def _solve_from(
        self, problem: Discretisation, guess: Iterate, max_iters: IntScalarLike | None
    ) -> JointSolution:
        iteration = self.iteration(problem)
        if self.guess.is_sequential(problem):
            return solve_in_turn(iteration)
        if max_iters is not None:
            max_iters = jnp.minimum(max_iters, iteration.limit(guess))
            iteration = dataclasses.replace(iteration, max_iters=max_iters)
        return iteration.run(guess)

    def _solve_roughly(
        self,
        problem: Discretisation,
        guess: Iterate | None,
        rtol: RealScalarLike,
        max_iters: IntScalarLike,
    ) -> JointSolution:
        """For a guess."""
        iteration = dataclasses.replace(
            self.iteration(problem), rtol=rtol, atol=None, max_iters=max_iters
        )
        return solve_in_turn(iteration) if guess is None else iteration.run(guess)

    def _error(
        self,
        problem: Discretisation,
        whole: Whole,
        at: Iterate,
        y_errors: PyTree[Array] | None,
    ) -> Float[Array, " size"] | None:
        if self._estimates_by_halving:
            return error_by_halving(problem, whole, at, self._solve_from)
        elif y_errors is None:
            return None
        else:
            errors = problem.scheme.ravel_all(y_errors, problem.substeps)
            return accumulated_error(whole.starts, whole.at.ys, errors)

    @property
    def _estimates_by_halving(self):
        return isinstance(self.solver, AbstractCollocation) and self.substeps % 2 == 0

    def _check_guess(self, guess, problem):
        expected = jax.eval_shape(lambda: problem.window.zeros(problem.substeps))
        form = lambda x: jtu.tree_map(lambda x: (jnp.shape(x), jnp.result_type(x)), x)
        if not isinstance(guess, Iterate) or form(guess) != form(expected):
            raise ValueError(
                "`DeerSolver(guess=...)` must return what `window.interpolated` does "
                f"for values of shape {expected.ys.shape}, but "
                f"`{type(self.guess).__name__}` does not. Expected\n{expected}\n"
                f"but got\n{guess}"
            )

    def _zero_trajectory(self, y0, reads):
        def zeros(y):
            return jnp.zeros((self.substeps, *jnp.shape(y)), jnp.result_type(y))

        return jtu.tree_map(zeros, Split(y0, reads).read(y0))

    def check_solver_state(
        self, solver_state: Any, y0: Y, reads: tuple[bool, ...]
    ) -> None:
        expected = jax.eval_shape(lambda: self._zero_trajectory(y0, reads))
        if isinstance(solver_state, DeerState):
            actual = jax.eval_shape(lambda: solver_state.ys)
            of_grid = self.grid.init(self.substeps, jnp.result_type(solver_state.t0))
            is_same_grid = jtu.tree_structure(of_grid) == jtu.tree_structure(
                (solver_state.fractions, solver_state.required_substeps)
            )
            if eqx.tree_equal(actual, expected) is True and is_same_grid:
                return
        raise ValueError(
            "`diffeqsolve(..., solver_state=...)` does not belong to this solve. "
            "`DeerSolver` needs a state saved with `SaveAt(solver_state=True)` by a "
            "`DeerSolver` with the same number of `substeps` and the same kind of "
            "`grid`, for a `y0` of the same shape and dtype. Expected a trajectory of "
            f"the form\n{expected}\n"
            f"but got the state\n{solver_state}"
        )


# Diffrax traces a step three or four times, of which one is enough. In what is compiled
# there is nothing to be seen of it.
@eqx.filter_jit(inline=True)  # pyright: ignore
def _step(
    solver: DeerSolver, *inputs: Any
) -> tuple[Y, Y | None, DenseInfo, DeerState, RESULTS]:
    solved = solver.solve_window(*inputs)
    return solved.y1, solved.y_error, solved.dense_info, solved.state, solved.result


class SolvedWindow(eqx.Module):
    """What a window has led to.

    **Attributes:**

    - `problem`: what has been solved, on the grid that it has been solved on.
    - `y1`, `y_error`: the value at its end, and the estimate of its error.
    - `dense_infos`: what the wrapped solver keeps of each substep for dense output.
    - `state`: what is known when the next window begins.
    - `result`: whether it has been solved.
    - `at`: all unknowns.
    - `whole`: the same, and all that follows from them.
    """

    problem: Discretisation
    y1: Y
    y_error: Y | None
    dense_infos: DenseInfo
    state: DeerState
    result: RESULTS
    at: Iterate
    whole: Whole

    @property
    def dense_info(self) -> DenseInfo:
        """What Diffrax keeps of it."""
        dense_info: DenseInfo = dict(dense_infos=self.dense_infos)
        if self.state.fractions is not None:
            dense_info["fractions"] = self.state.fractions
        return dense_info


DeerSolver.__init__.__doc__ = """**Arguments:**

- `solver`: the solver to wrap, which makes every substep. Any one-step method. Defaults
    to `diffrax.Dopri8()`.
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
    trajectory is the first guess instead. (But nothing is guessed if one substep is
    solved after the other, as on a CPU by default.)
- `grid`: where the substeps of each window begin and end. Either
    [`diffrax_deer.UniformGrid`][], the default, or [`diffrax_deer.AdaptiveGrid`][].
- `rtol`, `atol`: the iteration ends once the trajectory, stages included, is as close
    to that of the wrapped solver as a tenth of `atol + rtol * abs(value)`, judging by
    how quickly it converges. This has nothing to do with the accuracy of the wrapped
    solver. Where rounding errors alone are larger than that, the iteration ends when
    they are all that is left. `rtol` defaults to 1e-10 in double precision and to 5e-6
    in single precision (the lowest precision of all leaves of the state). `atol`
    defaults to `0.01 * rtol`, or to as much less as the largest value is less than 1.
- `norm`: a function `PyTree -> Scalar` that says how large a change is, relative to the
    tolerances. It is called with an array of shape `(substeps, size)`, where `size` is
    that of those leaves of the state that the vector field reads, or `(1, size)` if one
    substep is solved after the other.
- `max_iters`: the maximum number of iterations for each window, or each time that its
    grid moves. A positive integer. If more would be needed then the window fails.
    Defaults to one more than there are unknowns: `substeps`, times the number of stages
    plus one if the wrapped solver is a Runge--Kutta method. If the wrapped solver is
    explicit and the solution finite, then this always suffices. If it is implicit, then
    the default is at least 32. If one implicit substep is solved after the other, then
    each has so many iterations. (If the state has eight components or more, then these
    are preceded by up to 16 of a chord method, which has one Jacobian for a substep.)
- `sharding`: how each window is divided over devices, along its time axis. A
    `jax.sharding.NamedSharding` whose `PartitionSpec` names the axis (or a tuple of
    axes) of the mesh. Its number of devices must divide `substeps`, and its axes must
    be of type `Auto`. Defaults to `None`: all of it is on one device.
"""
