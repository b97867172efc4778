"""What it takes to swap `DeerSolver` and `DeerAdjoint` into calls of Diffrax, as they
are written in practice, and nothing else.

Each call is made as it is; with `solver=DeerSolver(...)` around its solver; with
`adjoint=DeerAdjoint()`; with both; and by Diffrax itself on the same grid, that is, the
original solver makes all the substeps of the windows that the swapped call has chosen.
(In a batch they are those of the example with the most windows.)

    python -m benchmarks.calls --output benchmarks/results/calls_cpu.json
"""

import argparse
import dataclasses
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
from diffrax_deer import ConstantGuess, DeerAdjoint, DeerSolver

from . import _study as study
from ._calls import Call, Diffeqsolve, DOUBLE, SINGLE
from ._span import Counter
from ._timing import measure, print_environment


# What takes longer than this altogether is called only three times, or once.
MAX_SECONDS = 1.0
ORIGINAL, SAME_GRID = "as it is", "same grid"
SOLVER, BOTH, ADJOINT = "solver=", "solver= and adjoint=", "adjoint="
CONTENDERS = (ORIGINAL, SOLVER, BOTH, ADJOINT, SAME_GRID)


_RAISED = re.compile(r"[\w.]*(Error|Exception|failure): ")


class Bound(NamedTuple):
    """What the ratio of two contenders should be below, in every call."""

    name: str
    base: str
    column: str
    what: str
    limit: float | None


BOUNDS = [
    *(
        Bound(name, SAME_GRID, "median_ms", what, 1.5)
        for name in (SOLVER, BOTH)
        for what in ("value", "gradient")
    ),
    Bound(ADJOINT, ORIGINAL, "median_ms", "value", 1.3),
    Bound(ADJOINT, ORIGINAL, "median_ms", "gradient", 1.2),
    *(
        Bound(name, ORIGINAL, "compile_seconds", what, 2.0)
        for name in (SOLVER, BOTH, ADJOINT)
        for what in ("value", "gradient")
    ),
    *(
        Bound(name, ORIGINAL, "median_ms", what, None)
        for name in (SOLVER, BOTH, SAME_GRID)
        for what in ("value", "gradient")
    ),
]


def _wrapped(solver: dfx.AbstractSolver) -> dfx.AbstractSolver:
    return DeerSolver(solver)


def swap(
    wrap: Callable[[dfx.AbstractSolver], dfx.AbstractSolver] = lambda solver: solver,
    each_term: Callable[[dfx.AbstractTerm], dfx.AbstractTerm] = lambda term: term,
    **changes: Any,
) -> Diffeqsolve:
    is_term = lambda x: isinstance(x, dfx.ODETerm)

    def diffeqsolve(terms, solver, *args, **kwargs):
        terms = jax.tree_util.tree_map(
            lambda x: each_term(x) if is_term(x) else x, terms, is_leaf=is_term
        )
        return dfx.diffeqsolve(terms, wrap(solver), *args, **{**kwargs, **changes})

    return diffeqsolve


def swaps(
    wrap: Callable[[dfx.AbstractSolver], dfx.AbstractSolver] = _wrapped,
    **more: Any,
) -> dict[str, Diffeqsolve]:
    adjoint = DeerAdjoint()
    return {
        ORIGINAL: swap(**more),
        SOLVER: swap(wrap, **more),
        BOTH: swap(wrap, adjoint=adjoint, **more),
        ADJOINT: swap(adjoint=adjoint, **more),
    }


def same_grid(call: Call) -> Diffeqsolve | None:
    """There is none if it is an event that ends the call."""
    has_event = False
    saveat = dfx.SaveAt(t0=True, steps=True, fn=lambda t, y, args: t)

    def find_windows(*args, **kwargs):
        nonlocal has_event
        has_event = kwargs.get("event") is not None
        changes: dict[str, Any] = {} if has_event else dict(saveat=saveat)
        return swap(_wrapped, **changes)(*args, **kwargs)

    inputs = call.params, call.data
    find = jax.jit(lambda *inputs: call.solve(find_windows, *inputs).ts).lower(*inputs)
    if has_event:
        return None
    ts = np.asarray(find.compile()(*inputs))
    ts = np.reshape(ts, (-1, ts.shape[-1]))
    ts = ts[np.argmax(np.sum(np.isfinite(ts), axis=1))]
    ts = ts[np.isfinite(ts)]
    windows = (ts - ts[0]) / (ts[-1] - ts[0])

    def diffeqsolve(terms, solver, t0, t1, dt0, *args, **kwargs):
        del dt0
        substeps = DeerSolver(solver).substeps
        parts = np.arange(substeps) / substeps
        grid = (windows[:-1, None] + np.diff(windows)[:, None] * parts).ravel()
        grid = (t0 + (t1 - t0) * jnp.asarray(grid)).astype(ts.dtype)
        grid = jnp.append(grid.at[0].set(t0), t1)
        if isinstance(solver, dfx.AbstractImplicitSolver):
            # Which otherwise takes its tolerances from the controller.
            tols = kwargs["stepsize_controller"]
            root_finder = dfx.VeryChord(rtol=tols.rtol, atol=tols.atol)
            solver = dataclasses.replace(solver, root_finder=root_finder)
        changes = dict(stepsize_controller=dfx.StepTo(grid), max_steps=len(grid))
        kwargs = {**kwargs, **changes}
        return dfx.diffeqsolve(terms, solver, t0, t1, None, *args, **kwargs)

    return diffeqsolve


def functions(call: Call, diffeqsolve: Diffeqsolve) -> dict[str, Callable]:
    """The value and its derivative, of the parameters and the data."""

    def value(params, data):
        return call.read(call.solve(diffeqsolve, params, data))

    if call.hessian:
        return dict(value=value, gradient=jax.hessian(value))
    loss = lambda params, data: call.loss(value(params, data))
    return dict(value=value, gradient=jax.value_and_grad(loss))


class Compiled(NamedTuple):
    call: Callable
    trace_seconds: float
    compile_seconds: float
    temp_bytes: int


def compiled(function: Callable, *args: Any) -> Compiled:
    jax.clear_caches()
    # What another contender has left behind is not to be cleared away in this one's
    # time.
    gc.collect()
    start = time.perf_counter()
    traced = jax.jit(function).trace(*args)
    trace_seconds = time.perf_counter() - start
    out: Any = traced.lower().compile()
    seconds = time.perf_counter() - start
    temp_bytes = out.memory_analysis().temp_size_in_bytes
    jax.block_until_ready(out(*args))
    return Compiled(out, trace_seconds, seconds, temp_bytes)


def span(call: Call, contender: str) -> int:
    """Of the value, from a constant guess: as on a GPU."""
    counter = Counter()

    def counted(term):
        def field(t, y, args):
            # Whatever the state is, it is counted by the first array of it.
            leaves, structure = jax.tree_util.tree_flatten(y)
            first = counter.wrap(lambda t, y, args: y)(t, leaves[0], args)
            y = jax.tree_util.tree_unflatten(structure, [first, *leaves[1:]])
            return term.vector_field(t, y, args)

        return dfx.ODETerm(field)

    wrap = lambda solver: DeerSolver(solver, guess=ConstantGuess())
    diffeqsolve = swaps(wrap, each_term=counted)[contender]
    value = functions(call, diffeqsolve)["value"]
    jax.block_until_ready(jax.jit(value)(call.params, call.data))
    return counter.read().span


def attempt(function: Callable, *args: Any) -> tuple[Any, str | None]:
    """What it returns, or why it does not."""
    try:
        return function(*args), None
    except Exception as e:
        lines = f"{type(e).__name__}: {e}".splitlines()
        # What was raised inside of a compiled program comes after a traceback.
        starts = [i for i, x in enumerate(lines) if _RAISED.match(x)]
        lines = lines[starts[-1] if starts else 0 :]
        end = lines.index("") if "" in lines else len(lines)
        return None, " ".join(lines[:end])[:500]


def rows_of(
    name: str,
    call: Call,
    contenders: tuple[str, ...],
    repeats: int,
    with_span: bool = True,
) -> list[study.Row]:
    inputs = call.params, call.data
    solves, errors = swaps(), {}
    if SAME_GRID in contenders:
        solves[SAME_GRID], errors[SAME_GRID] = attempt(same_grid, call)
    reference = None
    if call.adjoint is not None:
        solve = swap(adjoint=call.adjoint)
        gradient = functions(call, solve)["gradient"]
        reference, _ = attempt(jax.jit(gradient), *inputs)

    programs, failed = {}, {}
    for contender in contenders:
        solve = solves[contender]
        if solve is None:
            failed[contender, "value"] = errors[contender]
            continue
        for what, function in functions(call, solve).items():
            program, error = attempt(compiled, function, *inputs)
            if program is None:
                failed[contender, what] = error
            else:
                programs[contender, what] = program
        print(f"{name}: {contender} compiled", flush=True)

    rows: list[study.Row] = [
        dict(call=name, name=contender, what=what, failed=error)
        for (contender, what), error in failed.items()
        if error is not None
    ]
    for what in ("value", "gradient"):
        members = {x: program for (x, w), program in programs.items() if w == what}
        timings = measure(
            {x: program.call for x, program in members.items()},
            *inputs,
            repeats=repeats,
            compile_repeats=1,
            max_seconds=MAX_SECONDS,
            on_host=tuple(members),
        )
        expected = reference if what == "gradient" else None
        if expected is None and ORIGINAL in timings:
            expected = timings[ORIGINAL].output
        for contender, program in members.items():
            timing, far = timings[contender], None
            if expected is not None:
                far = study.distance(timing.output, expected)
            row = dict(
                call=name,
                name=contender,
                what=what,
                **timing.columns,
                trace_seconds=program.trace_seconds,
                compile_seconds=program.compile_seconds,
                temp_mib=program.temp_bytes / 2**20,
                difference=far,
                agrees=far is not None and far <= call.tolerance,
            )
            if with_span and what == "value" and contender != SAME_GRID:
                row["span"], row["span_failed"] = attempt(span, call, contender)
            rows.append(row)
    rows.sort(
        key=lambda row: (row["what"] == "gradient", contenders.index(row["name"]))
    )
    for row in rows:
        for base, column in ((ORIGINAL, "ratio"), (SAME_GRID, "same_grid_ratio")):
            row[column] = _ratio(rows, row, base, "median_ms")
        row["compile_ratio"] = _ratio(rows, row, ORIGINAL, "compile_seconds")
        print(_line(row), flush=True)
    return rows


def _ratio(rows, row, base, column) -> float | None:
    for other in rows:
        if (other["call"], other["what"]) == (row["call"], row["what"]):
            if other["name"] == base and column in other and column in row:
                return row[column] / other[column]
    return None


def _line(row) -> str:
    line = f"{row['call']:16}{row['what']:9}{row['name']:21}"
    if "failed" in row:
        return f"{line}{row['failed']}"
    number = lambda x, width: f"{'-' if x is None else f'{x:.3g}':>{width}}"
    line += f"{number(row['median_ms'], 8)} ms, x{number(row['ratio'], 6)}"
    line += f", same grid x{number(row['same_grid_ratio'], 6)}"
    line += f", compilation {row['compile_seconds']:5.2f} s"
    line += f" ({row['trace_seconds']:5.2f} s of it tracing)"
    line += f" x{number(row['compile_ratio'], 5)}, {number(row['temp_mib'], 6)} MiB"
    line += f", differs by {number(row['difference'], 8)}"
    if "span" in row:
        line += f", span {row['span'] or row['span_failed']}"
    return line if row["agrees"] else f"{line} (too far)"


def summary(rows: list[study.Row]) -> list[study.Row]:
    out = []
    for bound in BOUNDS:
        ratios: dict[str, float] = {}
        for row in rows:
            if (row["name"], row["what"]) == (bound.name, bound.what):
                ratio = _ratio(rows, row, bound.base, bound.column)
                if ratio is not None:
                    ratios[row["call"]] = ratio
        if len(ratios) == 0:
            continue
        worst = max(ratios, key=lambda call: ratios[call])
        out.append(
            dict(
                suite="Ratios",
                **bound._asdict(),
                mean=float(np.exp(np.mean(np.log(list(ratios.values()))))),
                worst=ratios[worst],
                worst_call=worst,
                above=[
                    call
                    for call, ratio in ratios.items()
                    if bound.limit is not None and ratio > bound.limit
                ],
                calls=len(ratios),
            )
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="what the names of calls contain")
    parser.add_argument(
        "--contender", choices=CONTENDERS, help=f"this one, beside {ORIGINAL!r}"
    )
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--no-span", action="store_true", help="compile less")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    contenders = CONTENDERS
    if args.contender is not None:
        contenders = tuple(dict.fromkeys([ORIGINAL, args.contender]))

    print_environment()
    # The first compilation of a process also pays for JAX's own start.
    attempt(compiled, jax.grad(lambda x: jnp.sin(x)), 1.0)
    rows = []
    for name, make in {**SINGLE, **DOUBLE}.items():
        if args.only not in name:
            continue
        # Not with a context: callbacks run in other threads, and would not see it.
        jax.config.update("jax_enable_x64", name in DOUBLE)
        rows += rows_of(name, make(), contenders, args.repeats, not args.no_span)
        study.save(args, rows, summary=summary(rows))
    study.show(summary(rows))


if __name__ == "__main__":
    main()
