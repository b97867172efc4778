"""Parallel over time or over the batch: a study on the CPU.

A device that is not kept busy by one trajectory could as well solve several of them.
`DeerSolver` needs more memory for each, so that a sequential solver has room for a
larger batch. Hence the number of trajectories per second is to be compared at equal
memory: that which XLA allocates, beside inputs and outputs.
"""

import functools as ft
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jax.random as jr
from diffrax_deer import DeerAdjoint
from matplotlib.axes import Axes

from . import _problems as zoo, _study as study
from ._timing import measure, print_environment


jax.config.update("jax_enable_x64", True)

PROBLEMS = {
    "two bodies": (zoo.two_body(), [1, 8, 64, 512]),
    "neural": (zoo.neural(32), [1, 4, 16, 64]),
}


def _batched(solve, size):
    return lambda y0s, args: jax.vmap(solve, in_axes=(0, None))(y0s[:size], args)


def rows_of(name: str, repeats: int) -> list[study.Row]:
    problem, sizes = PROBLEMS[name]
    noise = jr.normal(jr.key(0), (max(sizes), len(problem.y0)))
    y0s = problem.y0 + 0.01 * noise
    values = {"Tsit5": zoo.sequential(problem), "DEER": zoo.parallel(problem)}
    adjoint = DeerAdjoint(max_windows=problem.substeps + 1)
    both = {**values, "Tsit5, DeerAdjoint": zoo.sequential(problem, adjoint)}
    gradients = {key: zoo.loss_and_grad(solve) for key, solve in both.items()}
    rows = []
    for suite, solves in (("value", values), ("gradient", gradients)):
        functions = {
            (key, size): _batched(solve, size)
            for key, solve in solves.items()
            for size in sizes
        }
        timings = measure(
            functions, y0s, problem.args, repeats=repeats, compile_repeats=1
        )
        new_rows: list[study.Row] = [
            dict(
                suite=suite,
                problem=name,
                name=key,
                batch=size,
                temp_mib=timing.temp_bytes / 2**20,
                median_ms=1e3 * timing.median,
                per_second=size / timing.median,
            )
            for (key, size), timing in timings.items()
        ]
        if suite == "value":
            for row in new_rows:
                solved = timings[row["name"], row["batch"]].output
                row["converged"] = bool(jnp.all(solved.okay))
        for row in new_rows:
            row["tsit5_at_equal_memory"] = max(
                other["per_second"]
                for other in new_rows
                if other["name"] == "Tsit5"
                and (other["temp_mib"] <= row["temp_mib"] or other["batch"] == 1)
            )
        rows += new_rows
    return rows


def draw(rows: Sequence[study.Row], panels: list[Axes]) -> None:
    titles = {"value": "final value", "gradient": "... with gradient"}
    choices = [(name, suite) for name in PROBLEMS for suite in titles]
    for panel, (name, suite) in zip(panels, choices):
        where = dict(suite=suite, problem=name)
        for key in ("Tsit5", "DEER", "Tsit5, DeerAdjoint"):
            x, y = study.series(rows, "temp_mib", "per_second", name=key, **where)
            if not x:
                continue
            panel.plot(x, y, "o-", label=key)
            sizes, _ = study.series(rows, "batch", "per_second", name=key, **where)
            for size, x_, y_ in zip(sizes, x, y):
                # Below or above the point.
                label = f"\n\n{size}" if key == "DEER" else f"{size}\n\n"
                panel.text(x_, y_, label, ha="center", va="center", fontsize=6)
        panel.set(xscale="log", yscale="log")
        panel.margins(y=0.15)
        panel.set(xlabel="memory / MiB", ylabel="trajectories / s")
        panel.set_title(f"{name}: {titles[suite]}")
        panel.legend()


def main():
    args = study.arguments(__doc__)
    rows = [row for name in PROBLEMS for row in rows_of(name, args.repeats)]
    print_environment()
    study.show(rows)
    study.save(args, rows)
    study.figure(args.figure, (2, 2), ft.partial(draw, rows))


if __name__ == "__main__":
    main()
