"""What the studies have in common: their arguments, tables, files and figures."""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from tqdm import tqdm

from ._problems import error, parallel, Problem, reference, Solve, Solved
from ._timing import environment


_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.markersize": 4,
}

Row = dict[str, Any]


def arguments(doc: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--figure", type=Path, metavar="FILE.png")
    return parser.parse_args()


def compare(problem: Problem, solves: dict[str, Solve], columns: Row) -> list[Row]:
    """One row for each. All of them begin with `columns`. There are no timings: what is
    counted does not depend on the device."""
    true = jax.jit(reference(problem))(*problem.inputs)
    return [
        dict(**columns, name=name, **outcome(jax.jit(solve)(*problem.inputs), true))
        for name, solve in tqdm(solves.items(), unit="solve")
    ]


def sweep(
    problem: Problem,
    key: str,
    values: Sequence[float | None],
    make: Callable[[Any], dict[str, Any]],
    columns: Row,
) -> list[Row]:
    """One row for each value of `key`, of which `make` makes arguments of `DeerSolver`.
    There are no timings, so that all values but `None` can share a compilation.
    """
    solve = jax.jit(lambda value: parallel(problem, **make(value))(*problem.inputs))
    true = jax.jit(reference(problem))(*problem.inputs)
    return [
        {**columns, key: value, **outcome(solve(value), true)}
        for value in tqdm(values, unit="value")
    ]


def outcome(solved: Solved, true: jax.Array) -> Row:
    """What has become of an attempt: if it failed then it has no error."""
    converged = bool(solved.okay)
    return dict(
        converged=converged,
        iterations=int(solved.num_iterations),
        span=int(solved.span),
        error=error(solved.y1, true) if converged else None,
    )


def distance(actual: Any, expected: Any) -> float | None:
    """The largest error, relative to the largest number of each leaf. `None` if there
    is no number."""

    def one(x, y):
        # They may live on different devices.
        x, y = np.asarray(x), np.asarray(y)
        scale = np.max(np.abs(y))
        return float(np.max(np.abs(x - y)) / (1 if scale == 0 else scale))

    errors = jax.tree_util.tree_leaves(jax.tree_util.tree_map(one, actual, expected))
    return max(errors) if all(map(math.isfinite, errors)) else None


def show(rows: Sequence[Row], hide: Sequence[str] = ()) -> None:
    """Prints them as tables, one for each suite if there are any, without the columns
    in `hide`."""
    for suite in dict.fromkeys(row.get("suite") for row in rows):
        members = [row for row in rows if row.get("suite") == suite]
        keys = dict.fromkeys(key for row in members for key in row)
        keys = [key for key in keys if key not in ("suite", *hide)]
        lines = [keys] + [[_cell(row.get(key)) for key in keys] for row in members]
        widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
        print("" if suite is None else f"\n{suite}")
        for line in lines:
            print("  ".join(x.ljust(n) for x, n in zip(line, widths)).rstrip())


def _cell(value):
    if value is None:
        return "-"
    elif isinstance(value, float):
        return f"{value:.3g}"
    elif isinstance(value, list):
        return "-".join(map(_cell, value))
    else:
        return str(value)


def save(args: argparse.Namespace, rows: Sequence[Row], **more: Any) -> None:
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        out = dict(env=environment(), **more, rows=rows)
        args.output.write_text(json.dumps(out, indent=2) + "\n")


def figure(
    path: Path | None, shape: tuple[int, int], draw: Callable[[list[Axes]], None]
) -> None:
    """`draw` is given that many panels to draw into, row by row."""
    if path is None:
        return
    with matplotlib.rc_context(_STYLE):
        fig = Figure(figsize=(4.2 * shape[1], 3.1 * shape[0]), layout="constrained")
        panels = list(fig.subplots(*shape, squeeze=False).flat)
        draw(panels)
        for axis in (axis for panel in panels for axis in (panel.xaxis, panel.yaxis)):
            low, high = sorted(axis.get_view_interval())
            # Powers of ten are too few for such an axis.
            if axis.get_scale() == "log" and high < 1e3 * low:
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
                axis.set_minor_formatter(NullFormatter())
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=110)


def series(
    rows: Sequence[Row], x: str, y: str, **where: Any
) -> tuple[list[Any], list[Any]]:
    """The two columns of those rows that have both, and the values in `where`."""
    chosen = [
        row
        for row in rows
        if all(row.get(key) == value for key, value in where.items())
        and row.get(x) is not None
        and row.get(y) is not None
    ]
    return [row[x] for row in chosen], [row[y] for row in chosen]
