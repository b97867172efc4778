"""`DeerSolver`, and what users could use instead, at equal accuracy.

Every task is solved by all contenders, at several tolerances or numbers of steps. Of
each the fastest that is accurate enough is in the table, and what the gradient takes
is then measured with that one. (In some tasks the steps are given, and all make the
same.) Measurements of a task are interleaved, in one process, after a first call.
"""

import argparse
import functools as ft
from pathlib import Path

import jax
import jax.numpy as jnp
from matplotlib.axes import Axes

from . import _scans, _study as study, _tasks as tasks
from ._contenders import batched, Contender, contenders, peers, reference
from ._tasks import Task
from ._timing import measure, print_environment


jax.config.update("jax_enable_x64", True)
# On a GPU, products of matrices are made with three digits by default. Step size
# controllers mistake what is missing for the error, and make several times the steps.
jax.config.update("jax_default_matmul_precision", "highest")

# Of a function that is slow, fewer repetitions have to do.
_MAX_SECONDS = 2.0
# Of more steps, there is no reference for gradients.
_MAX_REFERENCE = 100_000


def suite(name: str) -> list[Task]:
    two_bodies, van_der_pol = tasks.two_bodies(), tasks.van_der_pol_oscillator()
    saves = tasks.two_bodies(saves=10_001)
    quick = [
        *(two_bodies, saves, van_der_pol),
        tasks.forced_oscillator(10_000),
        tasks.neural_cde(10_000),
        tasks.latent_ode(128),
        tasks.hamiltonian(128, steps=128),
    ]
    if name == "quick":
        return quick
    full = [
        *(*quick, tasks.lorenz()),
        *(two_bodies.batched(16), two_bodies.batched(256)),
        *(van_der_pol.batched(16), van_der_pol.batched(256)),
        saves.batched(16),
        two_bodies.cast(jnp.float32, 1e-4),
        *(tasks.forced_oscillator(10**n) for n in (2, 3, 5)),
        tasks.latent_ode(1024),
        tasks.hamiltonian(1024),
    ]
    if name == "full":
        return full
    single = lambda task: task.cast(jnp.float32, 1e-4)
    return [
        single(tasks.hamiltonian(10_000).batched(16)),
        single(tasks.hamiltonian(10_000, steps=10_000).batched(16)),
        # Single precision has too few digits for so many different times.
        *(tasks.forced_oscillator(10**n) for n in (4, 5, 6)),
        *(single(saves), single(tasks.neural_cde(10_000))),
    ]


def value_and_grad(solve):
    def loss(inputs, *knob):
        return jnp.mean(jnp.sin(solve(*inputs, *knob)))

    return lambda y0, args, *knob: jax.value_and_grad(loss)((y0, args), *knob)


def compare(
    task: Task, everyone: dict[str, Contender], repeats: int
) -> list[study.Row]:
    print(f"\n{task.name}")
    inputs = (task.y0, task.args)
    wide = task.cast(jnp.float64, task.error)
    true = batched(wide, reference(wide))
    solves = {
        (name, knob): solve
        for name, contender in everyone.items()
        for knob, solve in contender.solves(task).items()
    }
    timed = ft.partial(measure, repeats=repeats, max_seconds=_MAX_SECONDS)
    timings = timed(
        {key: fn for key, (fn, _) in solves.items()},
        *inputs,
        more_args={key: knob for key, (_, knob) in solves.items()},
        compile_repeats=1,
        on_host={key for key in solves if everyone[key[0]].on_host},
    )
    # Sequential, and so better not on a GPU.
    wide_inputs = jax.device_put((wide.y0, wide.args), jax.devices("cpu")[0])
    expected = jax.jit(true)(*wide_inputs)
    rows = [
        _row(task, "value", *key, timing, study.distance(timing.output, expected))
        for key, timing in timings.items()
    ]
    # Of each the best.
    chosen = {}
    for row in rows:
        best = chosen.get(row["name"])
        accurate = row["error"] is not None and row["error"] <= task.error
        if accurate and (best is None or row["median_ms"] < best["median_ms"]):
            chosen[row["name"]] = row
    for row in chosen.values():
        row["chosen"] = True
    gradients = {
        (name, row["knob"]): solves[name, row["knob"]]
        for name, row in chosen.items()
        if everyone[name].has_gradient
    }
    timings = timed(
        {key: value_and_grad(fn) for key, (fn, _) in gradients.items()},
        *inputs,
        more_args={key: knob for key, (_, knob) in gradients.items()},
        compile_repeats=1,
        cold=True,
    )
    # It would take minutes.
    if task.steps is not None and task.steps > _MAX_REFERENCE:
        expected = None
    else:
        expected = jax.jit(value_and_grad(true))(*wide_inputs)
    error = lambda x: None if expected is None else study.distance(x, expected)
    rows += [
        _row(
            *(task, "gradient", *key, timing, error(timing.output)),
            chosen=True,
            compile_seconds=timing.compile_seconds,
        )
        for key, timing in timings.items()
    ]
    # All relative to the first one.
    first = {row["what"]: row for row in reversed(rows) if row["chosen"]}
    for row in rows:
        if row["what"] not in first:
            continue
        row["ratio"] = row["median_ms"] / first[row["what"]]["median_ms"]
        if "compile_seconds" in row:
            compile_seconds = first[row["what"]]["compile_seconds"]
            row["compile_ratio"] = row["compile_seconds"] / compile_seconds
    study.show([row for row in rows if row["chosen"]], hide=("task", "chosen", "dtype"))
    return rows


def _row(task, what, name, knob, timing, error, chosen=False, **kwargs) -> study.Row:
    return dict(
        suite=what,
        task=task.name,
        what=what,
        name=name,
        knob=knob,
        dtype=str(task.y0.dtype),
        chosen=chosen,
        **timing.columns,
        error=error,
        temp_mib=timing.temp_bytes / 2**20,
        **kwargs,
    )


def draw(rows: list[study.Row], panels: list[Axes]) -> None:
    """Error against time, of those tasks in which there is a choice."""
    for panel, (task, members) in zip(panels, _choices(rows).items()):
        for name in dict.fromkeys(row["name"] for row in members):
            data = study.series(members, "error", "median_ms", name=name)
            style = "o-" if name.startswith("Deer") else "s--"
            panel.plot(*data, style, label=name, lw=2 if style == "o-" else 1)
        panel.set(xscale="log", yscale="log", xlabel="error", ylabel="time / ms")
        panel.set_title(task)
        panel.invert_xaxis()
    panels[0].legend(
        fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2
    )


def _choices(rows: list[study.Row]) -> dict[str, list[study.Row]]:
    out: dict[str, list[study.Row]] = {}
    for row in rows:
        if row.get("what") == "value":
            out.setdefault(row["task"], []).append(row)
    return {
        task: members
        for task, members in out.items()
        if len(members) > len({row["name"] for row in members})
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=("quick", "full", "gpu"), default="quick")
    parser.add_argument("--only", default="", help="what the names of tasks contain")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--figure", type=Path, metavar="FILE.png")
    parser.add_argument(
        "--peer-path",
        type=Path,
        action="append",
        default=[],
        help="a checkout of the original DEER, or of ELK. May be given repeatedly.",
    )
    args = parser.parse_args()

    print_environment()
    others, missing = peers(args.peer_path)
    for name, reason in missing.items():
        print(f"{name} left out: {reason}")
    rows = []

    def add(new_rows):
        # Whatever stops this must not cost what has been measured already.
        rows.extend(new_rows)
        study.save(args, rows, missing=missing)

    for size in _scans.sizes(args.suite) if args.only == "" else []:
        add(_scans.compare(*size, args.repeats, _MAX_SECONDS))
    for task in suite(args.suite):
        if args.only not in task.name:
            continue
        # These know neither batches, nor given steps, nor how to interpolate.
        is_simple = task.steps is None and task.ts is None and not task.is_batch
        asked = others if is_simple else {}
        everyone = {**contenders(task, args.suite), **asked}
        add(compare(task, everyone, args.repeats))
    number = len(_choices(rows))
    if number > 0:
        shape = (-(-number // 3), min(number, 3))
        study.figure(args.figure, shape, lambda panels: draw(rows, panels))


if __name__ == "__main__":
    main()
