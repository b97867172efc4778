r"""Whole intervals as a single window, with a tolerance: `AdaptiveGrid`.

For each problem and tolerance the smallest of some numbers of substeps that is accurate
enough, by the solver's own judgement, is compared with the adaptive Tsit5 that has the
same error: how many steps that accepts, and how many evaluations of the vector field
follow one another. Errors are the largest ones over the whole interval. For stiff
problems implicit solvers are used instead, and there is nothing to compare with.

    python -m benchmarks.grid --output benchmarks/results/grid.json \
        --figure docs/figures/grid.png
"""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
from diffrax_deer import (
    AdaptiveGrid,
    ConstantGuess,
    DeerSolver,
    GaussLegendre,
    UniformGrid,
)
from matplotlib.axes import Axes
from tqdm import tqdm

from . import _study as study, span
from ._span import counting


jax.config.update("jax_enable_x64", True)

TOLERANCES = (1e-4, 1e-6, 1e-8)
SUBSTEPS = (32, 64, 128, 256, 512, 1024, 2048)
# With so many numbers in a trajectory, at most.
MAX_NUMBERS = 2**13
# Of Tsit5, finely enough to find the one with the same error.
TOLERANCES_OF_TSIT5 = 10 ** np.arange(-2.0, -11.5, -0.5)
SAVES = 201
# More than this is not worth while.
MAX_ITERS = 256
BY_TSIT5, BY_GAUSS = "DeerSolver(Tsit5())", "DeerSolver(GaussLegendre(4))"
BY_KVAERNO = "DeerSolver(Kvaerno5())"


def problems() -> dict[str, span.Problem]:
    every = span.problems()
    names = [
        *("two bodies", "van der Pol, 5", "FitzHugh-Nagumo", "Brusselator"),
        *("Kepler, 0.6", "Lotka-Volterra", "neural, 16", "rigid body"),
        *("three bodies", "Pleiades", "double pendulum", "pulse"),
    ]

    def late_pulse(t, y, args):
        return -y + 5 * jnp.exp(-(((t - 6) / 0.03) ** 2))

    f, t1, _ = every["Kepler, 0.6"]
    eccentric = f, t1, [0.1, 0.0, 0.0, 19**0.5]
    return {name: every[name] for name in names} | {
        "narrow pulse": (late_pulse, 12.0, [1.0]),
        "Kepler, 0.9": eccentric,
    }


def stiff_problems() -> dict[str, span.Problem]:
    def hires(t, y, args):
        # Schäfer's, of eight substances, with different time scales.
        a, b, c, d, e, f, g, h = y
        s = 280 * f * h
        return jnp.stack(
            [
                -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
                1.71 * a - 8.75 * b,
                -10.03 * c + 0.43 * d + 0.035 * e,
                8.32 * b + 1.71 * c - 1.12 * d,
                -1.745 * e + 0.43 * f + 0.43 * g,
                -s + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
                s - 1.81 * g,
                -s + 1.81 * g,
            ]
        )

    def oregonator(t, y, args):
        a, b, c = y
        return jnp.stack(
            [
                77.27 * (b + a * (1 - 8.375e-6 * a - b)),
                (c - (1 + a) * b) / 77.27,
                0.161 * (a - c),
            ]
        )

    return {
        "HIRES": (hires, 321.8122, [1.0, 0, 0, 0, 0, 0, 0, 0.0057]),
        "Oregonator": (oregonator, 30.0, [1.0, 2.0, 3.0]),
    }


def _solver(problem: span.Problem, make: Callable[[Any], dict[str, Any]], substeps):
    """As a function of the tolerance: values, steps, whether it is successful, and what
    it says of itself."""
    vector_field, t1, y0 = problem
    y0 = jnp.asarray(y0, jnp.float64)
    ts = jnp.linspace(0.0, t1, SAVES)

    def solve(vector_field, tol):
        sol: Any = dfx.diffeqsolve(
            dfx.ODETerm(vector_field),
            t0=0,
            t1=t1,
            y0=y0,
            saveat=dfx.SaveAt(ts=ts, solver_state=substeps is not None),
            throw=False,
            **make(tol),
        )
        okay = sol.result == dfx.RESULTS.successful
        required = None if substeps is None else sol.solver_state.required_substeps
        return sol.ys, sol.stats["num_accepted_steps"], okay, required

    return counting(solve, vector_field)


def tsit5(problem: span.Problem):
    def make(tol):
        controller = dfx.PIDController(rtol=tol, atol=tol)
        solver = dict(solver=dfx.Tsit5(), dt0=span.DT0, max_steps=span.MAX_STEPS)
        return dict(solver, stepsize_controller=controller)

    return _solver(problem, make, None)


def one_window(problem: span.Problem, wrapped: dfx.AbstractSolver, substeps: int):
    def make(tol):
        grid = AdaptiveGrid(rtol=tol, atol=tol)
        options: Any = dict(grid=grid, guess=ConstantGuess(), max_iters=MAX_ITERS)
        solver = DeerSolver(wrapped, substeps, **options)
        return dict(solver=solver, dt0=problem[1], max_steps=1)

    return _solver(problem, make, substeps)


def true_values(problem: span.Problem, solver: dfx.AbstractSolver, tol: float):
    def make(tol):
        controller = dfx.PIDController(rtol=tol, atol=tol)
        solver_and_steps = dict(solver=solver, dt0=1e-3, max_steps=10**6)
        return dict(solver_and_steps, stepsize_controller=controller)

    (ys, *_), _ = _solver(problem, make, None)(tol)
    return np.asarray(ys)


def _error(ys, true) -> float:
    return float(np.max(np.abs(np.asarray(ys) - true)))


def _relative_error(ys, true) -> float:
    """As tolerances are: those that are relative and absolute are equal here."""
    errors = (np.asarray(ys) - true) / (1 + np.abs(true))
    return float(np.max(np.sqrt(np.mean(errors**2, axis=-1))))


def rows_of(name, problem, true, wrapped, progress) -> list[study.Row]:
    """For each solver and tolerance, the fewest substeps that are enough."""
    rows, curve = [], None
    if len(wrapped) > 1:
        solve = tsit5(problem)
        curve = []
        for tol in TOLERANCES_OF_TSIT5:
            (ys, steps, okay, _), count = solve(tol)
            if okay:
                curve.append((_error(ys, true), int(steps), count.span))
        progress.update()
    for label, solver in wrapped.items():
        left = list(TOLERANCES)
        choice = [n for n in SUBSTEPS if n * len(problem[2]) <= MAX_NUMBERS]
        for substeps in choice:
            solve = one_window(problem, solver, substeps)
            for tol in list(left):
                (ys, _, okay, required), count = solve(tol)
                if not okay and substeps != choice[-1]:
                    continue
                left.remove(tol)
                row = dict(problem=name, name=label, tolerance=tol, substeps=substeps)
                error = _error(ys, true) if okay else None
                row |= dict(required=int(required), span=count.span, error=error)
                row |= dict(in_tolerances=_relative_error(ys, true) / tol)
                if curve is not None and error is not None:
                    row |= against(curve, error, row)
                rows.append(row)
            progress.update()
            if len(left) == 0:
                break
    return rows


def against(curve, error: float, row: study.Row) -> study.Row:
    """How it compares with the Tsit5 that is as accurate. (Which, where errors are
    dominated by rounding, is the most accurate one.)"""
    errors, steps, spans = (np.log(np.array(x)) for x in zip(*sorted(curve)))
    steps, span = (np.exp(np.interp(np.log(error), errors, x)) for x in (steps, spans))
    return dict(
        required_ratio=row["required"] / float(steps),
        substeps_ratio=row["substeps"] / float(steps),
        shorter=float(span) / row["span"],
    )


def summary(rows: list[study.Row]) -> list[study.Row]:
    out = []
    keys = dict.fromkeys((row["name"], row["tolerance"]) for row in rows)
    for name, tol in keys:
        some = [r for r in rows if (r["name"], r["tolerance"]) == (name, tol)]
        solved = [row for row in some if row["error"] is not None]
        compared = [row for row in solved if "shorter" in row]
        median = lambda key: (
            float(np.median([row[key] for row in compared])) if compared else None
        )
        out.append(
            dict(
                name=name,
                tolerance=tol,
                problems=len(some),
                solved=len(solved),
                # In units of the tolerance.
                worst_error=max((row["in_tolerances"] for row in solved), default=None),
                required_ratio=median("required_ratio"),
                substeps_ratio=median("substeps_ratio"),
                shorter=median("shorter"),
            )
        )
    return out


def draw(panels: list[Axes]) -> None:
    """The solution of a problem, the points, and the errors before and after moves."""

    def van_der_pol(t, y, args):
        return jnp.stack([y[1], 5 * (1 - y[0] ** 2) * y[1] - y[0]])

    def solve(solver, dt0, **kwargs):
        sol: Any = dfx.diffeqsolve(
            *(dfx.ODETerm(van_der_pol), solver, 0.0, 20.0, dt0, jnp.array([2.0, 0.0])),
            saveat=dfx.SaveAt(ts=jnp.asarray(ts), solver_state=True),
            **kwargs,
        )
        return np.asarray(sol.ys), sol.solver_state

    ts = np.linspace(0, 20, 2001)
    controller = dfx.PIDController(rtol=1e-12, atol=1e-12)
    options = dict(stepsize_controller=controller, max_steps=10**6)
    true, _ = solve(dfx.Dopri8(), 1e-3, **options)
    solution, lengths, errors = panels
    solution.plot(ts, true[:, 0], color="black", linewidth=0.5)
    for name, grid, offset in (
        ("equal substeps", UniformGrid(), 0.0),
        # There is a single move: another one would not pay.
        ("after they have moved", AdaptiveGrid(), 0.6),
    ):
        solver = DeerSolver(dfx.Tsit5(), 256, guess=ConstantGuess(), grid=grid)
        ys, state = solve(solver, 20.0, max_steps=1)
        grid = np.linspace(0, 1, 257) if state.fractions is None else state.fractions
        grid = 20 * np.asarray(grid)
        values = np.interp(grid, ts, true[:, 0])
        [line] = solution.plot(grid, values + offset, ".", markersize=2)
        lengths.semilogy((grid[1:] + grid[:-1]) / 2, np.diff(grid), label=name)
        error = np.max(np.abs(ys - true), axis=1)
        errors.semilogy(ts[1:], error[1:], color=line.get_color())
    solution.set(title="Van der Pol: 256 points (shifted up)", ylabel="position")
    lengths.set(title="Length of the substeps", ylabel="time")
    errors.set(title="Error", ylabel="larger one of both components")
    for panel in panels:
        panel.set_xlabel("time")
    lengths.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)


def main() -> None:
    args = study.arguments(__doc__)
    study.figure(args.figure, (1, 3), draw)
    rows: list[study.Row] = []
    with tqdm(unit="compilation") as progress:
        for name, problem in problems().items():
            true = true_values(problem, dfx.Dopri8(), 1e-13)
            wrapped = {BY_TSIT5: dfx.Tsit5(), BY_GAUSS: GaussLegendre(4)}
            rows += rows_of(name, problem, true, wrapped, progress)
            study.save(args, rows, summary=summary(rows))
        for name, problem in stiff_problems().items():
            true = true_values(problem, dfx.Kvaerno5(), 1e-10)
            tol = 1e-10
            finder = dfx.VeryChord(rtol=tol, atol=tol)
            wrapped = {BY_KVAERNO: dfx.Kvaerno5(root_finder=finder)}
            rows += rows_of(name, problem, true, wrapped, progress)
            study.save(args, rows, summary=summary(rows))
    study.show(rows)
    study.show(summary(rows))


if __name__ == "__main__":
    main()
