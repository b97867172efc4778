import dataclasses
import math
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
    AbstractStepSizeController,
    AbstractTerm,
    AbstractWrappedSolver,
    ConstantStepSize,
    diffeqsolve,
    RESULTS,
    SaveAt,
)
from jaxtyping import Array, PyTree

from ._checks import check_instance
from ._custom_types import RealScalarLike
from ._guess import ConstantGuess
from ._iterate import Iteration, State
from ._linear_algebra import matvec
from ._method import AbstractDampedMethod, DEER
from ._solver import DeerSolver
from ._state import DeerState
from ._window import AbstractWindow, Iterate, ravel


# No more iterations of each window than these are kept.
_MAX_HISTORY = 1024
# A window should not take many more iterations than this, nor many fewer.
_TARGET = 10
_FEW = 5
# From this size of the state on, Jacobians take more memory than all else.
_LARGE = 64


@dataclasses.dataclass(frozen=True)
class Report:
    """What [`diffrax_deer.diagnose`][] has found. It prints well.

    **Attributes:**

    - `result`: as of `diffrax.Solution`.
    - `ts`: the times at which the windows begin and end. The last one may have failed.
    - `num_rejected`: the number of windows that were tried in vain.
    - `num_iterations`: the number of iterations of each window.
    - `sequential_evaluations`: of each window how many evaluations of the vector field,
        or of its derivative, followed one another. That is what a GPU waits for.
    - `residuals`: of each window the residual before each iteration, and after the
        last one: the largest by which a substep misses the next value, relative to the
        largest value of that component.
    - `fronts`: of each window, at the same moments, how many substeps had been solved,
        counting from its beginning: those before the first residual above the
        tolerance.
    - `fractions`: when the substeps of each window begin and end, from 0 to 1.
    - `required_substeps`: how many substeps it takes, in each window, to be as accurate
        as `AdaptiveGrid(rtol=..., atol=...)` asks for. `None` if nothing is asked for.
    - `lyapunov`: an estimate of the largest Lyapunov exponent, the rate (in one unit of
        time) at which nearby solutions diverge, or if negative converge. NaN if there
        is nothing to estimate it from.
    - `memory`: the bytes of memory that XLA allocates to solve a window, not including
        the output. `None` if it does not tell.
    - `recommended_substeps`: how many substeps to solve at once, if that should be
        changed: in windows that are longer or shorter in proportion. Otherwise `None`.
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
    memory: int | None
    # What was asked for: over how long a time, and who chose the windows.
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
            "result": "successful" if okay else RESULTS[self.result].splitlines()[0],
        }
        if windows > 0:
            rows["iterations"] = (
                f"{np.median(iterations):.0f} (median), {np.max(iterations)} (most)"
            )
            rows["span"] = f"{np.sum(self.sequential_evaluations)} evaluations in a row"
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
    terms: PyTree[AbstractTerm],
    solver: DeerSolver,
    t0: RealScalarLike,
    t1: RealScalarLike,
    dt0: RealScalarLike | None,
    y0: PyTree[Any],
    args: PyTree[Any] = None,
    *,
    stepsize_controller: AbstractStepSizeController = ConstantStepSize(),
    max_steps: int = 4096,
) -> Report:
    """Solves a differential equation, looks at how that went, and says what to change.

    Solutions that can be predicted are found in parallel, in few iterations. Where
    nearby solutions diverge quickly (the largest Lyapunov exponent is positive and
    large), windows must be short, or the guess good.

    !!! example

        ```python
        report = diagnose(term, DeerSolver(Tsit5(), 512), 0, 20, 20, y0, args)
        print(report)
        report.plot().savefig("report.png")
        ```

    **Arguments:**

    - `terms`, `t0`, `t1`, `dt0`, `y0`, `args`, `stepsize_controller`, `max_steps`: as
        for `diffrax.diffeqsolve`.
    - `solver`: the [`diffrax_deer.DeerSolver`][] to look at.

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
    check_instance(solver, DeerSolver, "diagnose(solver=...)")
    inputs = jtu.tree_leaves((terms, solver, t0, t1, dt0, y0, args))
    if any(isinstance(x, jax.core.Tracer) for x in inputs):
        raise TypeError("`diagnose` cannot be used inside of `jax.jit`.")
    max_iters = _MAX_HISTORY if solver.max_iters is None else solver.max_iters
    observed = _Observed(solver, min(max_iters, _MAX_HISTORY) + 1)

    @eqx.filter_jit
    def solve(terms, t0, t1, dt0, y0, args, stepsize_controller):
        return diffeqsolve(
            *(terms, observed, t0, t1, dt0, y0, args),
            stepsize_controller=stepsize_controller,
            saveat=SaveAt(dense=True),
            max_steps=max_steps,
            throw=False,
        )

    sol = solve(terms, t0, t1, dt0, y0, args, stepsize_controller)
    assert sol.interpolation is not None
    accepted = int(sol.stats["num_accepted_steps"])
    infos = jtu.tree_map(lambda x: np.asarray(x)[:accepted], sol.interpolation.infos)
    ts = np.asarray(sol.interpolation.direction * sol.interpolation.ts[: accepted + 1])
    # Those that were forgotten were in the middle.
    num_iterations = infos["num_iterations"].astype(int)
    kept = np.minimum(num_iterations, observed.history - 1) + 1
    okay = infos["okay"] == 1
    solved = float(np.sum(np.abs(np.diff(ts)), where=okay))
    growth = float(np.sum(infos["growth"], where=okay))
    size = sum(np.size(leaf) for leaf in jtu.tree_leaves(y0))
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
        memory=_memory(terms, solver, ts, y0, args),
        duration=abs(float(t1) - float(t0)),
        is_adaptive=not isinstance(stepsize_controller, ConstantStepSize),
    )


class _Observed(AbstractWrappedSolver[tuple[DeerState, Array]]):
    """A `DeerSolver` that tells how each of its windows was solved, as dense output."""

    solver: DeerSolver
    history: int = eqx.field(static=True)

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    @property
    def interpolation_cls(self):  # pyright: ignore
        return _no_interpolation

    @property
    def scan_kind(self):
        return self.solver.scan_kind

    @property
    def root_finder(self):
        return self.solver.root_finder

    @property
    def root_find_max_steps(self):
        return self.solver.root_find_max_steps

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)

    def init(self, terms, t0, t1, y0, args):
        flat_y0 = ravel(y0, y0)
        direction = jr.normal(jr.key(0), flat_y0.shape, flat_y0.dtype)
        return self.solver.init(terms, t0, t1, y0, args), direction

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        deer_state, direction = solver_state
        del made_jump
        solved = self.solver.solve_window(terms, t0, t1, y0, args, deer_state)
        problem, at, result = solved.problem, solved.at, solved.result
        iteration = self.solver.iteration(problem)
        guess, _ = self.solver.first_guess(problem, deer_state)
        state, residuals, fronts = _observe(iteration, guess, self.history)
        growth, direction = _growth(problem.window, at, direction)
        # As floating point numbers, for Diffrax fills what it does not use with `inf`.
        required = solved.state.required_substeps
        # Or it has been solved, but is not accurate enough.
        okay = (result == RESULTS.successful) | (result == RESULTS.dt_min_reached)
        info = dict(
            okay=okay.astype(at.ys.dtype),
            num_iterations=state.num_iterations.astype(at.ys.dtype),
            span=solved.state.sequential_evaluations.astype(at.ys.dtype),
            residuals=residuals,
            fronts=fronts,
            growth=growth,
            fractions=problem.fractions,
        )
        if required is not None:
            info["required"] = required.astype(at.ys.dtype)
        state = solved.state, direction
        return solved.y1, solved.y_error, info, state, result


def _no_interpolation(**kwargs):
    return None


def _observe(iteration: Iteration, guess: Iterate, history: int):
    """The iteration once more, keeping its residuals and fronts."""
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
    return state, *look(state, *kept)


def _growth(window: AbstractWindow, at: Iterate, direction: Array):
    """By how much a small perturbation grows over the window, as a logarithm, and where
    it points to at its end."""
    tiny = jnp.finfo(direction.dtype).tiny
    _, jacobians = DEER().linearise(window, window.points(at))

    def body(direction, A):
        moved = matvec(A, direction)
        norm = jnp.maximum(jnp.linalg.norm(moved), tiny)
        # What has vanished cannot be followed any further.
        okay = jnp.isfinite(norm) & (norm > tiny)
        return jnp.where(okay, moved / norm, direction), jnp.log(norm)

    direction = direction / jnp.maximum(jnp.linalg.norm(direction), tiny)
    A = window.eliminate(jacobians()).A
    direction, growth = lax.scan(body, direction, A)
    return jnp.sum(growth), direction


def _memory(terms, solver, ts, y0, args) -> int | None:
    if len(ts) < 2:
        return None

    def solve(y0):
        # A single window.
        return diffeqsolve(
            *(terms, solver, ts[0], ts[1], ts[1] - ts[0], y0, args),
            saveat=SaveAt(t1=True),
            max_steps=1,
            throw=False,
        ).ys

    dynamic_y0 = jtu.tree_map(jnp.asarray, y0)
    analysis = jax.jit(solve).lower(dynamic_y0).compile().memory_analysis()
    return getattr(analysis, "temp_size_in_bytes", None)


def _recommended_substeps(report: Report) -> int | None:
    if len(report.num_iterations) == 0:
        return None
    substeps, most = report.solver.substeps, np.max(report.num_iterations)
    if report.result == RESULTS.dt_min_reached and report.required_substeps is not None:
        return report.required_substeps
    failed = report.result != RESULTS.successful
    if failed or most > 1.5 * _TARGET:
        # What has been solved in time.
        fronts = [fronts[min(_TARGET, len(fronts) - 1)] for fronts in report.fronts]
        return max(int(min(fronts)), 1)
    elif most <= _FEW and np.max(np.abs(np.diff(report.ts))) < 0.99 * report.duration:
        return 2 * substeps
    else:
        return None


def _advice(report: Report) -> list[str]:
    solver, num_substeps = report.solver, report.recommended_substeps
    if len(report.num_iterations) == 0:
        return ["There is not a single window to look at."]
    length = float(np.max(np.abs(np.diff(report.ts))))
    is_damped = isinstance(solver.method, AbstractDampedMethod)
    advice = []

    if num_substeps is None:
        advice.append("The windows are about as long as they should be.")
    elif num_substeps == report.required_substeps:
        advice.append(
            "These are too few substeps for the tolerance of the `AdaptiveGrid`. Try "
            f"`substeps={num_substeps}`."
        )
    else:
        new = f"`substeps={num_substeps}`"
        if not report.is_adaptive:
            new += f" and `dt0={num_substeps / solver.substeps * length:.3g}`"
        if num_substeps > solver.substeps:
            advice.append(f"Few iterations. Try longer windows: {new}.")
        else:
            advice.append(
                f"In {_TARGET} iterations the first {num_substeps} of "
                f"{solver.substeps} substeps are solved. Try shorter windows: {new}."
            )
            if isinstance(solver.guess, ConstantGuess):
                advice.append(
                    "Or try a better guess: `guess=AutoGuess()`, or a `NestedGuess`."
                )
            if not is_damped:
                name = "ELK" if report.size < _LARGE else "QuasiELK"
                advice.append(f"Or try to damp the iteration: `method={name}()`.")
    if report.lyapunov * length > 1:
        factor = math.exp(min(report.lyapunov * length, 700))
        advice.append(
            f"Within a window, nearby solutions diverge by a factor of {factor:.2g}. "
            "Then it takes a good guess to solve it in few iterations. Over a length "
            f"of {1 / report.lyapunov:.2g} it is a factor of e."
        )
    elif math.isfinite(report.lyapunov):
        advice.append(
            "Nearby solutions hardly diverge within a window: it can be predicted."
        )
    if report.num_rejected > len(report.num_iterations):
        advice.append(
            "Most windows were rejected. With a small `max_iters` those that do not "
            "converge are given up sooner."
        )
    if report.size >= _LARGE:
        name = "QuasiELK" if is_damped else "QuasiDEER"
        advice.append(
            f"The state is large. Compare with `method={name}()`, which needs less "
            "memory."
        )
    return advice
