import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from diffrax import (
    AbstractAdaptiveStepSizeController,
    AbstractAdjoint,
    AbstractERK,
    AbstractProgressMeter,
    AbstractSolver,
    AbstractStepSizeController,
    ConstantStepSize,
    diffeqsolve,
    Event,
    NoProgressMeter,
    RecursiveCheckpointAdjoint,
    RESULTS,
    SaveAt,
)
from jaxtyping import Array

from ._adjoint import DeerAdjoint
from ._checks import check_instance
from ._custom_types import BoolScalarLike, PyTree, RealScalarLike, Terms
from ._failure import NONFINITE, TOO_MANY_ITERATIONS
from ._forwarding import AbstractForwardingSolver
from ._grid import Placed
from ._guess import ConstantGuess
from ._iterate import Iteration, State
from ._linear_algebra import matvec
from ._method import DEER, ELK
from ._solver import DeerSolver
from ._state import DeerState
from ._window import (
    AbstractWindow,
    Iterate,
    ravel,
    Split,
    tableau_of,
)


# No more iterations of each window than these are kept.
_MAX_HISTORY = 1024
# A window should not take many more iterations than this, nor many fewer.
_TARGET = 10
_FEW = 5
# From this size of the state on, Jacobians take more memory than all else.
_LARGE = 64
# An explicit step is unstable where it amplifies a perturbation by this much more than
# the differential equation does. Close to that it is where the step is this many times
# as long as the shortest time scale.
_UNSTABLE = 2.0
_STIFF = 2.0
# To solve jointly should shorten the span at least by this factor.
_WORTHWHILE = 1.5


@dataclasses.dataclass(frozen=True)
class Report:
    """What [`diffrax_deer.diagnose`][] has found. It prints well.

    **Attributes:**

    - `solver`: what has been looked at.
    - `size`: how many numbers of the state are solved for.
    - `result`: as of `diffrax.Solution`.
    - `ts`: the times at which the windows begin and end. The last one may have failed.
    - `num_rejected`: the number of windows that were tried in vain.
    - `num_iterations`: the number of iterations of each window.
    - `sequential_evaluations`: of each window how many evaluations of the vector field,
        or of its derivative, followed one another. That is what a GPU waits for.
    - `span`: the sum of these, over all windows, those that were rejected included.
    - `residuals`: of each window the residual before each iteration, and after the
        last one: the largest by which a substep misses the next value, relative to the
        largest value of that component.
    - `fronts`: of each window, at the same moments, how many substeps had been solved,
        counting from its beginning: those before the first residual above the
        tolerance.
    - `fractions`: when the substeps of each window begin and end, from 0 to 1.
    - `required_substeps`: how many substeps it takes to be as accurate as
        `AdaptiveGrid(rtol=..., atol=...)` asks for, in the window that takes most of
        them. `None` if nothing is asked for.
    - `lyapunov`: an estimate of the largest Lyapunov exponent, the rate (in one unit of
        time) at which nearby solutions diverge, or if negative converge. NaN if there
        is nothing to estimate it from.
    - `sequential`: how many evaluations of the vector field follow one another if the
        wrapped solver is used by itself in the same call (or on the same grid, with
        constant steps). `None` if it is implicit.
    - `is_sequential`: whether one substep was solved after the other, so that nothing
        was solved jointly, and there are no iterations to be seen. This is so on a CPU,
        by default.
    - `amplification`: the largest factor, over all substeps, by which the wrapped
        solver amplifies a perturbation and the differential equation does not. If it is
        explicit, and this is more than 2, then it is unstable. NaN if unknown.
    - `stiffness`: how many times the shortest time scale of the differential equation
        fits into a substep, at most; the median of all windows. NaN if unknown.
    - `memory`: the bytes of memory that XLA allocates to solve a window, not including
        the output. `None` if it does not tell.
    - `recommended_substeps`: how many substeps to solve at once, if that should be
        changed: in windows that are longer or shorter in proportion. Otherwise `None`.
    - `may_miss_events`: whether an event inside of a window would not be seen.
    - `duration`: from `t0` to `t1`, as was asked for.
    - `is_adaptive`: whether the step size controller chose the windows.
    - `advice`: recommendations, as sentences.
    """

    solver: DeerSolver
    size: int
    result: RESULTS
    ts: np.ndarray
    num_rejected: int
    num_iterations: np.ndarray
    sequential_evaluations: np.ndarray
    residuals: list[np.ndarray]
    fronts: list[np.ndarray]
    fractions: np.ndarray
    required_substeps: int | None
    lyapunov: float
    span: int
    sequential: int | None
    is_sequential: bool
    amplification: float
    stiffness: float
    memory: int | None
    may_miss_events: bool
    duration: float
    is_adaptive: bool

    @property
    def recommended_substeps(self) -> int | None:
        return _recommended_substeps(self)

    @property
    def advice(self) -> list[str]:
        return _advice(self)

    def __str__(self) -> str:
        name = lambda x: type(x).__name__
        solver = self.solver
        windows, iterations = len(self.num_iterations), self.num_iterations
        okay = bool(self.result == RESULTS.successful)
        rows = {
            "solver": f"{name(solver.method)} over {name(solver.solver)}",
            "guess": name(solver.guess),
            "windows": (
                f"{windows} of {solver.substeps} substeps, and {self.num_rejected} "
                f"rejected; state of size {self.size}"
            ),
            "result": "successful" if okay else _reason(self),
        }
        if windows > 0:
            rows["iterations"] = (
                f"{np.median(iterations):.0f} (median), {np.max(iterations)} (most)"
            )
            rows["span"] = f"{self.span} evaluations in a row"
            if self.sequential is not None and not self.is_sequential:
                alone = f"{name(solver.solver)} by itself"
                rows["span"] += f", {alone} {self.sequential}"
            final = max(residuals[-1] for residuals in self.residuals)
            rows["last residual"] = f"{final:.1e}"
        rows["Lyapunov exponent"] = f"{self.lyapunov:.2g}"
        if self.memory is not None:
            rows["memory"] = f"{self.memory / 2**20:.3g} MiB for a window"
        lines = [f"{key + ':':20}{value}" for key, value in rows.items()]
        return "\n".join([*lines, *(f"- {advice}" for advice in self.advice)])

    def plot(self) -> Any:
        """Draws the residuals against the iteration, and how the front moves in time.

        Needs matplotlib.

        **Returns:**

        A `matplotlib.figure.Figure`.
        """
        import matplotlib.pyplot as plt
        from matplotlib.ticker import MaxNLocator

        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9, 3.5), layout="constrained"
        )
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(self.residuals)))
        windows = zip(
            *(self.ts[:-1], self.ts[1:], self.residuals, self.fronts, self.fractions),
            colours,
        )
        for t0, t1, residuals, fronts, fractions, colour in windows:
            iterations = np.arange(len(residuals))
            # Neither zero nor infinity has a logarithm that can be drawn.
            shown = (residuals > 0) & np.isfinite(residuals)
            shown = np.where(shown, residuals, np.nan)
            left.semilogy(iterations, shown, ".-", color=colour)
            times = t0 + fractions[fronts] * (t1 - t0)
            right.step(times, iterations, where="pre", color=colour)
            right.axvline(t1, color="0.8", linewidth=0.5, zorder=0)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        right.yaxis.set_major_locator(MaxNLocator(integer=True))
        left.set(xlabel="iteration", ylabel="residual", title="Each window (by time)")
        right.set(xlabel="time", ylabel="iteration", title="Solved up to")
        return figure


def diagnose(
    terms: Terms,
    solver: DeerSolver,
    t0: RealScalarLike,
    t1: RealScalarLike,
    dt0: RealScalarLike | None,
    y0: PyTree[Any],
    args: PyTree[Any] = None,
    *,
    saveat: SaveAt = SaveAt(t1=True),
    stepsize_controller: AbstractStepSizeController[Any, Any] = ConstantStepSize(),
    adjoint: AbstractAdjoint = RecursiveCheckpointAdjoint(),
    event: Event | None = None,
    max_steps: int | None = 4096,
    throw: bool = True,
    progress_meter: AbstractProgressMeter[Any] = NoProgressMeter(),
    solver_state: DeerState | None = None,
    controller_state: PyTree[Any] | None = None,
    made_jump: BoolScalarLike | None = None,
) -> Report:
    """Solves a differential equation, looks at how that went, and says what to change.

    Solutions that can be predicted are found in parallel, in few iterations. Where
    nearby solutions diverge quickly (the largest Lyapunov exponent is positive and
    large), windows must be short, or the guess good. Where the span is no shorter than
    that of the wrapped solver by itself, this says to stay with that.

    !!! example

        ```python
        report = diagnose(term, DeerSolver(Tsit5(), 512), 0, 20, 20, y0, args)
        print(report)
        report.plot().savefig("report.png")
        ```

    **Arguments:**

    As for `diffrax.diffeqsolve`, so that a call of it can be turned into one of this.

    - `solver`: the [`diffrax_deer.DeerSolver`][] to look at.
    - `adjoint`: who looks for an `event`. It does not change how windows are solved.
        (But [`diffrax_deer.DeerAdjoint`][] merges the steps of
        `DeerSolver(substeps=1)`. Here, pass `substeps` and `dt0` of the merged windows
        instead.)
    - `saveat`, `throw`, `progress_meter`: are not used.
    - `max_steps`: of everything there are this many windows in memory. `None` is as
        many as the default.

    **Returns:**

    A [`diffrax_deer.Report`][]. If the solve fails, then it says so.

    This cannot be used inside of `jax.jit`.

    ??? cite "Reference"

        On what the Lyapunov exponent has to do with it:

        ```bibtex
        @article{gonzalez2025predictability,
            author={Gonzalez, Xavier and Kozachkov, Leo and Zoltowski, David M. and
                    Clarkson, Kenneth L. and Linderman, Scott W.},
            title={Predictability Enables Parallelization of Nonlinear State Space
                   Models},
            journal={arXiv:2508.16817},
            year={2025},
        }
        ```
    """
    del saveat, throw, progress_meter
    if isinstance(solver, AbstractSolver) and not isinstance(solver, DeerSolver):
        raise TypeError(
            "`diagnose(solver=...)` must be an instance of `DeerSolver`, got "
            f"{solver!r}. Wrap it: `DeerSolver({solver!r})`."
        )
    check_instance(solver, DeerSolver, "diagnose(solver=...)")
    inputs = jtu.tree_leaves((terms, solver, t0, t1, dt0, y0, args))
    if any(isinstance(x, jax.core.Tracer) for x in inputs):
        raise TypeError("`diagnose` cannot be used inside of `jax.jit`.")
    max_iters = _MAX_HISTORY if solver.max_iters is None else solver.max_iters
    spans: list[int] = []
    observed = _Observed(
        *(solver, min(max_iters, _MAX_HISTORY) + 1),
        # Diffrax forgets all about windows that are rejected.
        tell=lambda span: spans.append(int(span)),
    )
    if solver_state is not None:
        solver_state = observed.with_direction(solver_state)  # pyright: ignore
    max_steps = 4096 if max_steps is None else max_steps

    def solve(solver, max_steps, **kwargs):
        return diffeqsolve(
            *(terms, solver, t0, t1, dt0, y0, args),
            stepsize_controller=stepsize_controller,
            event=event,
            max_steps=max_steps,
            throw=False,
            made_jump=made_jump,
            **kwargs,
        )

    sol = solve(
        observed,
        max_steps,
        saveat=SaveAt(dense=True),
        solver_state=solver_state,
        controller_state=controller_state,
    )
    jax.effects_barrier()
    assert sol.interpolation is not None
    accepted = int(sol.stats["num_accepted_steps"])
    infos = jtu.tree_map(lambda x: np.asarray(x)[:accepted], sol.interpolation.infos)
    ts = np.asarray(sol.interpolation.direction * sol.interpolation.ts[: accepted + 1])
    is_adaptive = isinstance(stepsize_controller, AbstractAdaptiveStepSizeController)
    if is_adaptive and _is_explicit(solver.solver):
        alone = solve(solver.solver, max_steps * solver.substeps)
        steps = int(alone.stats["num_steps"])
    else:
        steps = accepted * solver.substeps
    # Those that were forgotten were in the middle.
    num_iterations = infos["num_iterations"].astype(int)
    kept = np.minimum(num_iterations, observed.history - 1) + 1
    okay = infos["okay"] == 1
    solved = float(np.sum(np.abs(np.diff(ts)), where=okay))
    growth = float(np.sum(infos["growth"], where=okay))
    reads = solver.leaves_read(terms, t0, t1, y0, args)
    size = sum(np.size(leaf) for leaf in jtu.tree_leaves(Split(y0, reads).read(y0)))
    return Report(
        solver=solver,
        size=size,
        result=sol.result,
        ts=ts,
        num_rejected=int(sol.stats["num_rejected_steps"]),
        num_iterations=num_iterations,
        sequential_evaluations=infos["span"].astype(int),
        residuals=[x[:k] for x, k in zip(infos["residuals"], kept)],
        fronts=[x[:k].astype(int) for x, k in zip(infos["fronts"], kept)],
        fractions=infos["fractions"],
        required_substeps=(
            int(np.max(infos["required"], initial=0)) if "required" in infos else None
        ),
        lyapunov=growth / solved if solved > 0 and size > 0 else math.nan,
        span=sum(spans),
        sequential=_evaluations(solver.solver, steps),
        is_sequential=bool(np.any(infos["is_sequential"] == 1)),
        amplification=_summary(np.max, infos["amplification"]),
        stiffness=_summary(np.median, infos["stiffness"]),
        memory=_memory(terms, solver, ts, y0, args, stepsize_controller),
        may_miss_events=event is not None and not isinstance(adjoint, DeerAdjoint),
        duration=abs(float(t1) - float(t0)),
        is_adaptive=is_adaptive,
    )


def _is_explicit(solver: AbstractSolver) -> bool:
    """Whether it is known how many evaluations a step takes."""
    tableau = tableau_of(solver)
    return tableau is None or tableau.is_explicit


def _evaluations(solver: AbstractSolver, steps: int) -> int | None:
    """How many evaluations these steps take, one after the other. (Of a solver that is
    no Runge--Kutta method, how many steps.)"""
    tableau = tableau_of(solver)
    if tableau is None:
        return steps
    elif not tableau.is_explicit:
        return None
    # The last stage of a step may be the first one of the next.
    is_reused = isinstance(solver, AbstractERK) and solver.tableau.fsal  # pyright: ignore
    return (tableau.stages - 1) * steps + 1 if is_reused else tableau.stages * steps


def _summary(fn, x: np.ndarray) -> float:
    x = x[np.isfinite(x)]
    return float(fn(x)) if len(x) > 0 else math.nan


class _Observed(AbstractForwardingSolver[tuple[DeerState, Array]]):
    """A `DeerSolver` that tells how each of its windows was solved, as dense output."""

    solver: DeerSolver
    history: int = eqx.field(static=True)
    tell: Callable[[Array], None] = eqx.field(static=True)

    @property
    def interpolation_cls(self):  # pyright: ignore
        return _no_interpolation

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def init(self, terms, t0, t1, y0, args):
        return self.with_direction(self.solver.init(terms, t0, t1, y0, args))

    def with_direction(self, state: DeerState) -> tuple[DeerState, Array]:
        y = jtu.tree_map(lambda ys: ys[0], state.ys)
        flat = ravel(y, y)
        return state, jr.normal(jr.key(0), flat.shape, flat.dtype)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        deer_state, direction = solver_state
        del made_jump
        solver = self.solver
        reads = solver.leaves_read(terms, t0, t1, y0, args)
        problem = solver.uniform_problem(terms, t0, t1, y0, args, reads)
        is_sequential = solver.guess.is_sequential(problem)
        if is_sequential or not solver.grid.is_uniform:
            solved = solver.solve_window(terms, t0, t1, y0, args, deer_state)
            problem, at = solved.problem, solved.at
            if not is_sequential:
                # How it would go on the grid that was found.
                at, _ = solver.first_guess(problem, deer_state)
            iteration = solver.iteration(problem)
            if is_sequential:
                # A look at it is all there is, also if it has failed.
                iteration = dataclasses.replace(iteration, max_iters=1)
            seen = _observe(iteration, at, self.history)
        else:
            iteration = solver.iteration(problem)
            guess, span = solver.first_guess(problem, deer_state)
            seen = _observe(iteration, guess, self.history)
            # Which need not be solved for again.
            solution = iteration.solution(seen.state)
            solution = dataclasses.replace(solution, span=solution.span + span)
            solved = solver.solved(problem, Placed(None, solution, None, True))
        result = solved.result
        jax.debug.callback(self.tell, solved.state.sequential_evaluations)
        growth, amplification, stiffness, direction = _linearised(
            problem.window, solved.at, direction
        )
        dtype = solved.at.ys.dtype
        # Or it has been solved, but is not accurate enough.
        okay = (result == RESULTS.successful) | (result == RESULTS.dt_min_reached)
        # As floating point numbers, for Diffrax fills what it does not use with `inf`.
        info = dict(
            okay=okay.astype(dtype),
            num_iterations=seen.state.num_iterations.astype(dtype),
            span=solved.state.sequential_evaluations.astype(dtype),
            residuals=seen.residuals,
            fronts=seen.fronts,
            growth=growth,
            amplification=amplification,
            stiffness=stiffness,
            fractions=problem.fractions,
            is_sequential=jnp.asarray(is_sequential, dtype),
        )
        if solved.state.required_substeps is not None:
            info["required"] = solved.state.required_substeps.astype(dtype)
        state = solved.state, direction
        # A failure rejects the window, as it would without being looked at.
        failed = result != RESULTS.successful
        select = lambda x, y: jtu.tree_map(lambda x, y: jnp.where(failed, x, y), x, y)
        y_error = solved.y_error
        if y_error is not None:
            inf = jtu.tree_map(lambda y: jnp.full_like(y, jnp.inf), y_error)
            y_error = select(inf, y_error)
        return select(y0, solved.y1), y_error, info, state, result


class _Seen(eqx.Module):
    state: State
    # Before each iteration, and after the last one.
    residuals: Array
    fronts: Array


def _no_interpolation(**kwargs):
    return None


def _observe(iteration: Iteration, guess: Iterate, history: int) -> _Seen:
    """The iteration, keeping its residuals and fronts."""
    window = iteration.window

    def look(state: State, residuals, fronts):
        ys = state.at.ys
        r = jtu.tree_map(jnp.subtract, window.all_targets(state.at), state.at)
        r = jnp.abs(window.net(r))
        r = jnp.where(jnp.isfinite(r), r, jnp.inf)
        scale = jnp.max(jnp.abs(ys), axis=0)
        residual = jnp.max(r / jnp.where(scale > 0, scale, 1), initial=0)
        solved = jnp.all(r <= iteration.tolerance(jnp.abs(ys)), axis=-1)
        front = jnp.sum(jnp.cumprod(solved)).astype(ys.dtype)
        index = jnp.minimum(state.num_iterations, history - 1)
        return residuals.at[index].set(residual), fronts.at[index].set(front)

    def body(carry):
        state, *kept = carry
        return iteration.step(state), *look(state, *kept)

    empty = jnp.zeros(history, guess.ys.dtype), jnp.zeros(history, guess.ys.dtype)
    state, *kept = lax.while_loop(
        lambda carry: iteration.goes_on(carry[0]),
        body,
        (iteration.init(guess), *empty),
    )
    return _Seen(state, *look(state, *kept))


def _linearised(window: AbstractWindow, at: Iterate, direction: Array):
    """By how much a small perturbation grows over the window, as a logarithm, how
    unstable and how stiff it is, and where the perturbation points to at its end."""
    tiny = jnp.finfo(direction.dtype).tiny
    _, jacobians = DEER().linearise(window, window.points(at))
    J = jacobians()

    def body(direction, A):
        moved = matvec(A, direction)
        norm = jnp.maximum(jnp.linalg.norm(moved), tiny)
        # What has vanished cannot be followed any further.
        okay = jnp.isfinite(norm) & (norm > tiny)
        return jnp.where(okay, moved / norm, direction), jnp.log(norm)

    direction = direction / jnp.maximum(jnp.linalg.norm(direction), tiny)
    A = window.eliminate(J).A
    direction, growth = lax.scan(body, direction, A)
    return jnp.sum(growth), *_stability(window, A, J), direction


def _stability(window: AbstractWindow, A: Array, J: Array) -> tuple[Array, Array]:
    """By what factor the substeps amplify perturbations where the differential equation
    does not, and how many time scales they are long: the largest of each."""
    size = A.shape[-1]
    if window.stage_shape == (0, 0) or size == 0:
        # Nothing is known of what is inside of a substep.
        return jnp.array(jnp.nan, A.dtype), jnp.array(jnp.nan, A.dtype)
    # Of the increments of all stages, which are in proportion to the step size.
    J = jnp.sum(J, axis=1)
    # No norm is smaller than this.
    norm = lambda x: jnp.sqrt(jnp.sum(x**2, axis=(-2, -1)) / size)
    # The differential equation amplifies by no more than the exponential of this.
    # (Gershgorin's circles of the symmetric part: its logarithmic norm is inside.)
    symmetric = (J + jnp.swapaxes(J, -2, -1)) / 2
    diagonal = jnp.diagonal(symmetric, axis1=-2, axis2=-1)
    others = jnp.sum(jnp.abs(symmetric), axis=-1) - jnp.abs(diagonal)
    bound = jnp.max(diagonal + others, axis=(-2, -1))
    amplification = norm(A) * jnp.exp(-jnp.maximum(bound, 0))
    largest = lambda x: jnp.max(jnp.where(jnp.isfinite(x), x, 0), initial=0)
    return largest(amplification), largest(norm(J))


def _memory(terms, solver, ts, y0, args, stepsize_controller) -> int | None:
    if len(ts) < 2:
        return None
    # Whose tolerances an implicit solver may take.
    if not isinstance(stepsize_controller, AbstractAdaptiveStepSizeController):
        stepsize_controller = ConstantStepSize()

    def solve(y0):
        # A single window.
        return diffeqsolve(
            *(terms, solver, ts[0], ts[1], ts[1] - ts[0], y0, args),
            stepsize_controller=stepsize_controller,
            saveat=SaveAt(t1=True),
            max_steps=1,
            throw=False,
        ).ys

    dynamic_y0 = jtu.tree_map(jnp.asarray, y0)
    analysis = jax.jit(solve).lower(dynamic_y0).compile().memory_analysis()
    return getattr(analysis, "temp_size_in_bytes", None)


def _reason(report: Report) -> str:
    """Why there is no solution."""
    if report.result == TOO_MANY_ITERATIONS:
        return "a window has not converged within `max_iters` iterations"
    elif report.result == NONFINITE:
        return "a window has got nonfinite values (inf or NaN)"
    elif report.required_substeps is not None and (
        report.result == RESULTS.dt_min_reached
    ):
        return "less accurate than `AdaptiveGrid(rtol=..., atol=...)` asks for"
    else:
        return RESULTS[report.result].splitlines()[0]


def _is_unstable(report: Report) -> bool:
    return (
        issubclass(type(report.solver.solver), AbstractERK)
        and report.amplification > _UNSTABLE
    )


def _is_stiff(report: Report) -> bool:
    """Whether an adaptive controller has made explicit steps as long as they could be
    without being unstable."""
    return (
        issubclass(type(report.solver.solver), AbstractERK)
        and report.is_adaptive
        and report.stiffness > _STIFF
    )


def _recommended_substeps(report: Report) -> int | None:
    if len(report.num_iterations) == 0:
        return None
    substeps, most = report.solver.substeps, np.max(report.num_iterations)
    if report.result == RESULTS.dt_min_reached and report.required_substeps is not None:
        return report.required_substeps
    if report.is_sequential or _is_unstable(report) or _is_stiff(report):
        # It is something else that should be changed.
        return None
    if report.result != RESULTS.successful or most > 1.5 * _TARGET:
        # What has been solved in time. If that is all or nothing, then it is not for
        # the length of the windows.
        fronts = [fronts[min(_TARGET, len(fronts) - 1)] for fronts in report.fronts]
        return int(min(fronts)) if 0 < min(fronts) < substeps else None
    elif most <= _FEW and np.max(np.abs(np.diff(report.ts))) < 0.99 * report.duration:
        return 2 * substeps
    else:
        return None


def _advice(report: Report) -> list[str]:
    if len(report.num_iterations) == 0:
        if report.result == RESULTS.successful:
            return ["There is not a single window to look at."]
        return [
            "No window could be solved, however short. Is the vector field finite at "
            "`t0` and `y0`?"
        ]
    length = float(np.max(np.abs(np.diff(report.ts))))
    return [
        *_advice_on_events(report),
        *_advice_on_failure(report),
        *_advice_on_windows(report, length),
        *_advice_on_span(report),
        *_advice_on_growth(report, length),
        *_advice_on_cost(report),
    ]


def _advice_on_events(report: Report) -> list[str]:
    if not report.may_miss_events:
        return []
    return [
        "Events are looked for at the ends of windows only, so that one inside may not "
        "be seen. With `adjoint=DeerAdjoint()` it is."
    ]


def _advice_on_failure(report: Report) -> list[str]:
    name, (begin, end) = type(report.solver.solver).__name__, report.ts[-2:]
    if report.result == NONFINITE:
        where = f"Between t={begin:.4g} and t={end:.4g} not all values are finite."
    elif report.result == RESULTS.max_steps_reached:
        where = (
            f"It got as far as t={end:.4g}, at last in windows of a length of "
            f"{abs(end - begin):.2g}. If these are not short, pass more `max_steps`."
        )
    else:
        return []
    return [
        f"{where} If `{name}()` by itself gets no further, then the vector field is "
        "not finite there, or the solution ends."
    ]


def _advice_on_windows(report: Report, length: float) -> list[str]:
    solver, num_substeps = report.solver, report.recommended_substeps
    name = type(solver.solver).__name__
    if num_substeps is not None and num_substeps == report.required_substeps:
        return [
            "These are too few substeps for the tolerance of the `AdaptiveGrid`. Try "
            f"`substeps={num_substeps}`."
        ]
    if _is_unstable(report):
        step = length / solver.substeps
        return [
            f"`{name}` is unstable at steps of {step:.2g}, sequentially as well: one "
            f"of them amplifies perturbations {report.amplification:.2g} times, where "
            "the differential equation does not. Shorter windows of the same steps "
            "change nothing. The problem is stiff: use an implicit solver, for example "
            "`RadauIIA(3)`, or much shorter steps."
        ]
    if _is_stiff(report):
        return [
            f"The steps of `{name}` are as long as they can be without being unstable. "
            "The problem is stiff: use an implicit solver, for example `RadauIIA(3)`."
        ]
    if report.is_sequential:
        advice = [
            "One substep was solved after the other, as suits a CPU: nothing was "
            "solved jointly. With `guess=ConstantGuess()` this says what a GPU would "
            "do."
        ]
        if report.result == TOO_MANY_ITERATIONS:
            advice.append("One of them could not be solved. Try shorter steps.")
        return advice
    if num_substeps is None:
        if report.result != RESULTS.successful:
            return []
        return ["The windows are about as long as they should be."]
    new = f"`substeps={num_substeps}`"
    if not report.is_adaptive:
        new += f" and `dt0={num_substeps / solver.substeps * length:.3g}`"
    if num_substeps > solver.substeps:
        return [f"Few iterations. Try longer windows: {new}."]
    advice = [
        f"In {_TARGET} iterations the first {num_substeps} of {solver.substeps} "
        f"substeps are solved. Try shorter windows: {new}."
    ]
    if isinstance(solver.guess, ConstantGuess):
        advice.append("Or try a better guess, for example `guess=NestedGuess()`.")
    return advice


def _advice_on_span(report: Report) -> list[str]:
    if report.sequential is None or report.is_sequential:
        return []
    if _is_unstable(report) or report.result != RESULTS.successful:
        return []
    shorter = report.sequential / max(report.span, 1)
    if shorter >= _WORTHWHILE:
        return []
    return [
        f"Stay sequential: `{type(report.solver.solver).__name__}` by itself takes "
        f"{report.sequential} evaluations in a row, and this {report.span}."
    ]


def _advice_on_growth(report: Report, length: float) -> list[str]:
    if not math.isfinite(report.lyapunov) or _is_unstable(report):
        return []
    if report.lyapunov * length <= 1:
        return ["Nearby solutions hardly diverge within a window: it can be predicted."]
    factor = math.exp(min(report.lyapunov * length, 700))
    return [
        f"Within a window, nearby solutions diverge by a factor of {factor:.2g}. Then "
        "it takes a good guess to solve it in few iterations. Over a length of "
        f"{1 / report.lyapunov:.2g} it is a factor of e."
    ]


def _advice_on_cost(report: Report) -> list[str]:
    advice = []
    if report.num_rejected > len(report.num_iterations):
        advice.append(
            "Most windows were rejected. With a small `max_iters` those that do not "
            "converge are given up sooner."
        )
    if report.size >= _LARGE and isinstance(report.solver.method, (DEER, ELK)):
        advice.append(
            "The state is large. Compare with `method=Picard()`, or for many small "
            "systems `method=QuasiDEER(samples=1, block=...)`, which need less memory."
        )
    return advice
