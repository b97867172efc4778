"""The span: how many evaluations of the vector field, or of its derivative, follow one
another. That is what a GPU waits for, and it can be counted anywhere.

Everything is counted by an instrumented vector field, which ticks once for a batch, in
the program as it is compiled. Our solvers start from a constant guess, as they do by
default on everything but CPUs.

    python -m benchmarks.span --output benchmarks/results/span.json
"""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
from diffeqzoo import ivps
from diffrax_deer import ConstantGuess, DeerSolver, GaussLegendre
from tqdm import tqdm

from . import _problems as zoo, _study as study
from ._span import Count, counting


jax.config.update("jax_enable_x64", True)

RTOLS = (1e-3, 1e-6, 1e-9)
RTOL_ONE_WINDOW = 1e-6
DT0 = 0.05
MAX_STEPS = 100_000
# Of windows that are the whole interval, the first of these that is as accurate as the
# adaptive Tsit5 is taken.
SUBSTEPS = (32, 64, 128, 256, 512)

Problem = tuple[Callable, float, Any]


def problems() -> dict[str, Problem]:
    """A vector field, the length of the interval, and the initial value. The second
    half has only been looked at to measure."""

    def of_literature(name, t1, **kwargs):
        f, y0, _, params = getattr(ivps, name)(**kwargs)
        return lambda t, y, args: f(y, *params), t1, y0

    def kepler(eccentricity):
        def f(t, y, args):
            return jnp.concatenate([y[2:], -y[:2] / jnp.sum(y[:2] ** 2) ** 1.5])

        ratio = (1 + eccentricity) / (1 - eccentricity)
        return f, 4 * np.pi, [1 - eccentricity, 0.0, 0.0, ratio**0.5]

    def brusselator(t, y, args):
        return jnp.stack([1 + y[0] ** 2 * y[1] - 4 * y[0], 3 * y[0] - y[0] ** 2 * y[1]])

    def pendulum(t, y, args):
        drive = 0.5 * jnp.cos(0.7 * t)
        return jnp.stack([y[1], -jnp.sin(y[0]) - 0.1 * y[1] + drive])

    def pulse(t, y, args):
        return -y + 5 * jnp.exp(-(((t - 6) / 0.3) ** 2))

    def double_pendulum(t, y, args):
        a, b, p, q = y
        cos, sin = jnp.cos(a - b), jnp.sin(a - b)
        da, db = (p - q * cos) / (1 + sin**2), (2 * q - p * cos) / (1 + sin**2)
        return jnp.stack(
            [da, db, -2 * jnp.sin(a) - da * db * sin, -jnp.sin(b) + da * db * sin]
        )

    neural, driven = zoo.neural(16), zoo.driven(8, 20.0, 64)
    weights = neural.args, driven.args
    return {
        "two bodies": (zoo.two_body().term.vector_field, 10.0, zoo.two_body().y0),
        "van der Pol, 2": of_literature(
            "van_der_pol_first_order", 20.0, stiffness_constant=2.0
        ),
        "van der Pol, 5": of_literature(
            "van_der_pol_first_order", 20.0, stiffness_constant=5.0
        ),
        "Lorenz": of_literature("lorenz63", 5.0),
        "FitzHugh-Nagumo": of_literature("fitzhugh_nagumo", 100.0),
        "Lotka-Volterra": of_literature("lotka_volterra", 20.0),
        "Brusselator": (brusselator, 20.0, [1.5, 3.0]),
        "pendulum": (pendulum, 30.0, [1.0, 0.0]),
        "Kepler, 0.6": kepler(0.6),
        "Hénon-Heiles": of_literature("henon_heiles_first_order", 30.0),
        "neural, 16": (
            lambda t, y, args: neural.term.vector_field(t, y, weights[0]),
            10.0,
            neural.y0,
        ),
        # Only measured.
        "rigid body": of_literature("rigid_body", 20.0),
        "Pleiades": of_literature("pleiades_first_order", 1.5),
        "Rössler": of_literature("roessler", 20.0),
        "three bodies": of_literature("three_body_restricted_first_order", 10.0),
        "SIR": of_literature("sir", 100.0),
        "Kepler, 0.3": kepler(0.3),
        "double pendulum": (double_pendulum, 10.0, [1.0, 0.5, 0.0, 0.0]),
        "pulse": (pulse, 12.0, [1.0]),
        "driven, 8": (
            lambda t, y, args: driven.term.vector_field(t, y, weights[1]),
            20.0,
            driven.y0,
        ),
    }


def contenders() -> dict[str, dfx.AbstractSolver]:
    guess = ConstantGuess()
    return {
        "Tsit5": dfx.Tsit5(),
        "Dopri8": dfx.Dopri8(),
        "Kvaerno5": dfx.Kvaerno5(),
        "DeerSolver()": DeerSolver(guess=guess),
        "DeerSolver(Tsit5(), 128)": DeerSolver(dfx.Tsit5(), 128, guess=guess),
        "DeerSolver(GaussLegendre(4))": DeerSolver(GaussLegendre(4), guess=guess),
    }


def adaptive(problem: Problem, solver: dfx.AbstractSolver):
    """As a function of the tolerance."""
    vector_field, t1, y0 = problem
    y0 = jnp.asarray(y0, jnp.float64)

    def solve(vector_field, rtol):
        sol = dfx.diffeqsolve(
            *(dfx.ODETerm(vector_field), solver, 0, t1, DT0, y0),
            stepsize_controller=dfx.PIDController(rtol=rtol, atol=rtol),
            max_steps=MAX_STEPS,
            throw=False,
        )
        return sol.ys, sol.stats["num_steps"], sol.result == dfx.RESULTS.successful

    return counting(solve, vector_field)


def one_window(problem: Problem, solver: DeerSolver):
    vector_field, t1, y0 = problem
    y0 = jnp.asarray(y0, jnp.float64)

    def solve(vector_field):
        sol = dfx.diffeqsolve(
            *(dfx.ODETerm(vector_field), solver, 0, t1, t1, y0),
            max_steps=1,
            throw=False,
        )
        return sol.ys, 1, sol.result == dfx.RESULTS.successful

    return counting(solve, vector_field)()


def true_solution(problem: Problem):
    vector_field, t1, y0 = problem
    return dfx.diffeqsolve(
        *(dfx.ODETerm(vector_field), dfx.Dopri8(), 0, t1, 1e-3),
        jnp.asarray(y0, jnp.float64),
        stepsize_controller=dfx.PIDController(rtol=1e-13, atol=1e-13),
        max_steps=10**6,
    ).ys


def _row(suite, name, contender, counted, true, first) -> study.Row:
    (ys, steps, okay), number = counted
    assert isinstance(number, Count)
    return dict(
        suite=suite,
        problem=name,
        name=contender,
        span=number.span,
        work=number.work,
        steps=int(steps),
        error=float(np.max(np.abs(np.asarray(ys - true)))) if okay else None,
        # How many times shorter than that of Tsit5.
        shorter=None if first is None or not okay else first / number.span,
    )


def adaptive_rows(name: str, problem: Problem, true) -> list[study.Row]:
    rows, firsts = [], {}
    for contender, solver in contenders().items():
        solve = adaptive(problem, solver)
        for rtol in RTOLS:
            counted = solve(rtol)
            first = firsts.setdefault(rtol, counted[1].span)
            suite = f"adaptive, rtol={rtol:.0e}"
            rows.append(_row(suite, name, contender, counted, true, first))
    return rows


def one_window_rows(name: str, problem: Problem, true) -> list[study.Row]:
    counted = adaptive(problem, dfx.Tsit5())(RTOL_ONE_WINDOW)
    first = counted[1].span
    suite = f"one window, as accurate as at rtol={RTOL_ONE_WINDOW:.0e}"
    rows = [_row(suite, name, "Tsit5, adaptive", counted, true, first)]
    for wrapped in (GaussLegendre(4), dfx.Dopri8(), dfx.Tsit5()):
        row = None
        for substeps in SUBSTEPS:
            solver = DeerSolver(wrapped, substeps, guess=ConstantGuess())
            label = f"{type(wrapped).__name__}"
            row = _row(suite, name, label, one_window(problem, solver), true, first)
            row["substeps"] = substeps
            if row["error"] is not None and row["error"] <= rows[0]["error"]:
                break
        assert row is not None
        rows.append(row)
    return rows


def summary(rows: list[study.Row]) -> list[study.Row]:
    out = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        members = [row for row in rows if row["suite"] == suite]
        for name in dict.fromkeys(row["name"] for row in members):
            ratios = [row["shorter"] for row in members if row["name"] == name]
            ratios = sorted(0.0 if ratio is None else ratio for ratio in ratios)
            out.append(
                dict(
                    suite=f"{suite}: how many times shorter than Tsit5",
                    name=name,
                    median=float(np.median(ratios)),
                    worst=ratios[0],
                    second_worst=ratios[min(1, len(ratios) - 1)],
                    problems=len(ratios),
                )
            )
    return out


def main() -> None:
    args = study.arguments(__doc__)
    rows = []
    for name, problem in tqdm(problems().items(), unit="problem"):
        true = true_solution(problem)
        rows += adaptive_rows(name, problem, true)
        rows += one_window_rows(name, problem, true)
        study.save(args, rows, summary=summary(rows))
    study.show(rows)
    study.show(summary(rows))


if __name__ == "__main__":
    main()
