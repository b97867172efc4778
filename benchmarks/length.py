"""How the time grows with the number of grid points: a study on the CPU.

The step size is constant, so that the horizon grows. Two problems of 8 states: two
bodies, whose orbits repeat, so that errors of the phase add up; and a driven network,
which forgets. `DeerSolver` solves them in a single window, or in windows of constant
length, one after the other. Gradients are those of a function of the final value with
respect to the initial value, and to the 64 weights of the network.
"""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import jax
from diffrax_deer import DeerAdjoint
from matplotlib.axes import Axes
from tqdm import tqdm

from . import _problems as zoo, _study as study
from ._timing import measure, print_environment


jax.config.update("jax_enable_x64", True)

POINTS = [100, 1000, 10_000, 100_000]
# Grid points in each window, if there are several.
WINDOW = 100
# Then a single window is given up.
MAX_ITERS = 50
# Enough for solves that take seconds.
FEW_REPEATS = 3

PROBLEMS: dict[str, Callable[[int], zoo.Problem]] = {
    "two bodies": lambda points: zoo.two_body(points / 128, points),
    "driven network": lambda points: zoo.driven(8, points / 10, points),
}
ONE = "DEER, one window"


def rows_of(name: str, points: int, repeats: int, one_window: bool) -> list[study.Row]:
    problem = PROBLEMS[name](points)
    repeats = repeats if points <= 10_000 else min(repeats, FEW_REPEATS)
    values = {
        "Tsit5": zoo.sequential(problem),
        f"DEER, windows of {WINDOW}": zoo.parallel(problem, windows=points // WINDOW),
    }
    if one_window:
        values[ONE] = zoo.parallel(problem, max_iters=MAX_ITERS)
    timings = measure(values, *problem.inputs, repeats=repeats, compile_repeats=1)
    true = jax.jit(zoo.reference(problem))(*problem.inputs)
    columns = dict(suite="value", problem=name, points=points)
    rows = []
    for key, timing in timings.items():
        outcome = study.outcome(timing.output, true)
        rows.append(dict(**columns, name=key, **outcome, median_ms=1e3 * timing.median))

    backward = DeerAdjoint(max_windows=points + 1)
    values["Tsit5, DeerAdjoint"] = zoo.sequential(problem, backward)
    failed = {row["name"] for row in rows if not row["converged"]}
    gradients = {
        key: zoo.loss_and_grad(solve)
        for key, solve in values.items()
        if key not in failed
    }
    timings = measure(gradients, *problem.inputs, repeats=repeats, compile_repeats=1)
    _, true = timings["Tsit5"].output
    columns = dict(suite="gradient", problem=name, points=points)
    for key, timing in timings.items():
        _, gradient = timing.output
        error = zoo.error(gradient, true)
        rows.append(
            dict(**columns, name=key, error=error, median_ms=1e3 * timing.median)
        )
    if not one_window:
        note = "left out, as it fails on fewer points"
        rows.append(dict(**columns, name=ONE, note=note))
    return rows


def draw(rows: Sequence[study.Row], panels: list[Axes]) -> None:
    titles = {"value": "final value", "gradient": "... with gradient"}
    choices = [(name, suite) for name in PROBLEMS for suite in titles]
    colors = {}
    for panel, (name, suite) in zip(panels, choices):
        where: dict[str, Any] = dict(suite=suite, problem=name)
        members = [row for row in rows if row.items() >= where.items()]
        for key in dict.fromkeys(row["name"] for row in members):
            color = colors.setdefault(key, f"C{len(colors)}")
            shown = [row for row in members if row.get("converged", True)]
            data = study.series(shown, "points", "median_ms", name=key)
            if data[0]:
                panel.plot(*data, "o-", color=color, label=key)
        panel.set(xscale="log", yscale="log", ylabel="time / ms", xlabel="grid points")
        panel.set_title(f"{name}: {titles[suite]}")
        panel.legend()


def main():
    args = study.arguments(__doc__)
    rows = []
    for name in PROBLEMS:
        one_window = True
        for points in tqdm(POINTS, desc=name, unit="length"):
            new_rows = rows_of(name, points, args.repeats, one_window)
            one_window &= all(row.get("converged", True) for row in new_rows)
            rows += new_rows
    print_environment()
    study.show(rows)
    study.save(args, rows)
    study.figure(args.figure, (2, 2), ft.partial(draw, rows))


if __name__ == "__main__":
    main()
