"""Writes the results of `python -m benchmarks` into a document, as tables.

Between `<!-- FILE.json -->` and `<!-- end -->`, for every such pair of lines, where
`FILE.json` is in `benchmarks/results`. Of a study, `<!-- FILE.json, SUITE -->` is
one of its tables.
"""

import argparse
import json
import math
import re
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results"


def tables(file: Path) -> str:
    content = json.loads(file.read_text())
    env, rows = content["env"], content["rows"]
    versions = ", ".join(f"{name} {value}" for name, value in env.items())
    is_counted = any("waits" in row for row in rows)
    lines = [f"{'Compiled' if is_counted else 'Measured'} on: {versions}.", ""]
    for name, reason in content.get("missing", {}).items():
        absent = "ModuleNotFoundError" in reason
        why = "it was not installed" if absent else f"`{reason}`"
        lines += [f"{name} was left out: {why}.", ""]
    chosen = [row for row in rows if row.get("chosen")]
    for task in dict.fromkeys(row["task"] for row in chosen):
        members = [row for row in chosen if row["task"] == task]
        lines += [f"### {task[0].upper()}{task[1:]}", ""]
        lines += _compare(members), ""
        tried = dict.fromkeys(row["name"] for row in rows if row.get("task") == task)
        names = {row["name"] for row in members}
        failed = [name for name in tried if name not in names]
        if len(failed) > 0:
            what = "at any of the accuracies that it was asked for"
            lines += [f"Not accurate enough {what}: {', '.join(failed)}.", ""]
    if any("call" in row for row in rows):
        lines += _calls(rows, content["summary"])
        rows = []
    if any("required" in row for row in rows):
        lines += [_grid_summary(content["summary"]), "", _grids(rows), ""]
        rows = []
    if is_counted:
        lines += [_kernels(rows), ""]
        rows = []
    recurrences = [row for row in rows if "iterations" in row]
    if len(recurrences) > 0:
        lines += [_recurrences(recurrences), ""]
    scans = [row for row in rows if row.get("suite") == "linear recurrence"]
    if len(scans) > 0:
        lines += ["### The linear recurrence alone", "", _scans(scans), ""]
    for suite in dict.fromkeys(row["suite"] for row in rows if "span" in row):
        members = [row for row in rows if row["suite"] == suite]
        summary = content["summary"]
        lines += [f"### {suite[0].upper()}{suite[1:]}", "", _spans(members), ""]
        lines += [_span_summary([x for x in summary if x["suite"].startswith(suite)])]
        lines += [""]
    return "\n".join(lines).strip()


def in_short(file: Path) -> str:
    """Every task in a line: what users have, what is fair to compare with, and ours."""
    content = json.loads(file.read_text())
    if "summary" in content:
        return _spans_in_short(content["summary"])
    rows = [row for row in content["rows"] if row.get("chosen")]
    names = ("sequential", "sequential, `DeerAdjoint`", "`DeerSolver`, `DeerAdjoint`")
    cells = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for what in ("value", "gradient"):
            members = {
                _kind(row["name"]): row
                for row in rows
                if (row["task"], row["what"]) == (task, what)
            }
            times = [
                members[i]["median_ms"] if i in members else None for i in range(3)
            ]
            show = lambda x: "not measured" if x is None else _time(x)
            label = (
                f"{task[0].upper()}{task[1:]}" if what == "value" else "... gradient"
            )
            cells.append([label, *(show(x) for x in times)])
    return _markdown(["", *names], cells)


def _time(ms: float) -> str:
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.3g} s"


def _kind(name: str) -> int | None:
    """Which of the three it is, or `None` for all others."""
    if name.startswith("DeerSolver"):
        return None if "adaptive" in name else 2
    elif name.startswith(("Tsit5", "Euler")):
        return 1 if "DeerAdjoint" in name else 0
    return None


def _spans_in_short(summary: list[dict[str, Any]]) -> str:
    """In the median, and in the worst case."""
    names = {
        "DeerSolver()": "`DeerSolver()` in the same call, from a constant guess",
        "GaussLegendre": "one window of `GaussLegendre(4)`, as accurate as `Tsit5`",
    }
    tolerances = ("1e-03", "1e-06", "1e-09")
    cells = []
    for name, label in names.items():
        line = [label]
        for tolerance in tolerances:
            found = [
                f"{row['median']:.2g} ({row['worst']:.2g})"
                for row in summary
                if row["name"] == name and f"rtol={tolerance}" in row["suite"]
            ]
            line += found or [""]
        cells.append(line)
    return _markdown(
        ["", *(f"`rtol={x.replace('-0', '-')}`" for x in tolerances)], cells
    )


def _grid_summary(summary: list[dict[str, Any]]) -> str:
    lines = [
        "| | tolerance | solved | largest error, in tolerances | substeps, against the "
        "steps of Tsit5 | span, shorter than that of Tsit5 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in summary:
        times = lambda key: "" if row[key] is None else f"{row[key]:.3g} times"
        cells = [f"`{row['name']}`", f"{row['tolerance']:.0e}"]
        cells += [f"{row['solved']} of {row['problems']}", f"{row['worst_error']:.2g}"]
        cells += [times("substeps_ratio"), times("shorter")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _grids(rows: list[dict[str, Any]]) -> str:
    tols = list(dict.fromkeys(row["tolerance"] for row in rows))
    lines = [
        "| | | " + " | ".join(f"{tol:.0e}" for tol in tols) + " |",
        "| --- | --- |" + " --- |" * len(tols),
    ]
    for problem, name in dict.fromkeys((row["problem"], row["name"]) for row in rows):
        cells = [problem, f"`{name}`"]
        for tol in tols:
            [row] = [
                row
                for row in rows
                if (row["problem"], row["name"], row["tolerance"])
                == (problem, name, tol)
            ]
            if row["error"] is None:
                cells.append(f"more than {row['substeps']}")
            else:
                cells.append(f"{row['substeps']}, span {row['span']}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _calls(rows: list[dict[str, Any]], bounds: list[dict[str, Any]]) -> list[str]:
    """One table of what all the ratios come to, and then one of each quantity."""
    lines = ["### In short", "", _bounds(bounds), ""]
    cell = lambda row, column: _ratio(row[column]) + ("" if row["agrees"] else " (!)")
    time = lambda row: _ms(row) if row["ratio"] in (1, None) else cell(row, "ratio")
    seconds = lambda row: f"{row['compile_seconds']:.1f} s"
    tables = {
        "Value": ("value", time),
        "Gradient": ("gradient", time),
        "Compilation of the gradient": ("gradient", seconds),
        "Memory of the gradient": (
            "gradient",
            lambda row: f"{row['temp_mib']:.2g} MiB",
        ),
    }
    if any(row.get("span") for row in rows):
        tables["Span of the value"] = (
            "value",
            lambda row: f"{row.get('span') or '-'}",
        )
    names = list(dict.fromkeys(row["name"] for row in rows))
    for title, (what, show) in tables.items():
        cells = []
        for call in dict.fromkeys(row["call"] for row in rows):
            members = {
                row["name"]: row
                for row in rows
                if (row["call"], row["what"]) == (call, what)
            }
            line = [call]
            for name in names:
                row = members.get(name)
                if row is None:
                    line.append("-")
                else:
                    line.append("failed" if "failed" in row else show(row))
            cells.append(line)
        lines += [f"### {title}", "", _markdown(["", *names], cells), ""]
    failed = [row for row in rows if "failed" in row]
    for row in failed:
        where = f"{row['call']}, {row['name']}, {row['what']}"
        lines += [f"Failed: {where}: `{row['failed'][:160]}`.", ""]
    return lines


def _bounds(bounds: list[dict[str, Any]]) -> str:
    columns = {"median_ms": "time", "compile_seconds": "compilation"}
    cells = [
        [
            f"{row['name']} / {row['base']}",
            f"{columns[row['column']]}, {row['what']}",
            "-" if row["limit"] is None else f"{row['limit']:g}",
            f"{row['mean']:.2f}",
            f"{row['worst']:.2f} ({row['worst_call']})",
            "-" if row["limit"] is None else f"{len(row['above'])} of {row['calls']}",
        ]
        for row in bounds
    ]
    header = ["ratio", "", "bound", "geometric mean", "worst", "above the bound"]
    return _markdown(header, cells)


def _large(rows: list[dict[str, Any]]) -> str:
    def cell(row):
        memory = f"{row['temp_mib']:,.2g} MiB"
        if row["temp_mib"] >= 100:
            memory = f"{row['temp_mib']:,.0f} MiB"
        if "converged" not in row:
            return f"not run ({memory})"
        elif not row["converged"]:
            return f"not within {row['iterations']} iterations"
        return f"{row['span']} ({memory})"

    return _crosstab(
        "span (memory)", rows, itemgetter("problem"), itemgetter("name"), cell
    )


def _devices(rows: list[dict[str, Any]]) -> str:
    """What each device holds, and how much is exchanged."""

    def cell(row):
        exchanged = sum(row["exchanged_bytes"].values())
        return f"{row['mib_per_device']:.3g} MiB ({exchanged / 2**10:.1f} KiB)"

    substeps = lambda row: f"{row['substeps']:,} substeps"
    devices = lambda row: f"{row['devices']} devices"
    return _crosstab("", rows, substeps, devices, cell).replace("1 devices", "1 device")


def _sdes(rows: list[dict[str, Any]]) -> str:
    """How many times as fast as Diffrax's default adjoint."""
    whats = dict(value="", gradient=", with gradient")
    code = lambda name: ", ".join(f"`{x}`" for x in name.split(", "))
    contender, *others = dict.fromkeys(row["name"] for row in rows)
    header = [""]
    for words in whats.values():
        header += [contender + words, *map(code, others)]
    cells = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        line = [suite]
        for what in ("value", "value and gradient"):
            some = {
                row["name"]: row
                for row in rows
                if row["suite"] == suite and row["what"] == what
            }
            line.append(f"{some[contender]['median_ms']:.3g} ms")
            times = (1 / some[name]["time_ratio"] for name in others)
            line += [f"{x:.2g} times as fast" for x in times]
        cells.append(line)
    return _markdown(header, cells)


def _kernels(rows: list[dict[str, Any]]) -> str:
    """How many kernels each loop launches, and how often the host waits there."""
    header = ["", "", "value: a step or window", "... within it"]
    header += ["gradient: a step or chunk backwards", "... within it"]
    cells = []
    for key in dict.fromkeys((row["task"], row["name"]) for row in rows):
        of_call = [row for row in rows if (row["task"], row["name"]) == key]
        line = [*key]
        # Forwards, a gradient does the same as a value, and stores it.
        for what, label in (("value", "a step"), ("gradient", "backwards")):
            outer, *inner = (
                f"{row['kernels']} ({row['waits']})"
                for row in of_call
                if row["what"] == what and row.get("loop", "").startswith(label)
            )
            line += [outer, ", ".join(inner) or "-"]
        cells.append(line)
    return _markdown(header, cells)


def _spans(rows: list[dict[str, Any]]) -> str:
    def cell(row):
        if row["error"] is None:
            return "failed"
        substeps = f", {row['substeps']} substeps" if "substeps" in row else ""
        return f"{row['span']} ({row['error']:.0e}{substeps})"

    return _crosstab(
        "span (error)", rows, itemgetter("problem"), itemgetter("name"), cell
    )


def _span_summary(rows: list[dict[str, Any]]) -> str:
    ratio = lambda x: f"{x:.1f}"
    columns = ("median", "worst", "second_worst")
    cells = [[row["name"], *(ratio(row[column]) for column in columns)] for row in rows]
    header = ["times shorter than `Tsit5`", "median", "worst", "second worst"]
    return _markdown(header, cells)


def _compare(rows: list[dict[str, Any]]) -> str:
    header = ["", "time", "", "error", "memory"]
    header += ["gradient", "", "error", "compilation", ""]
    cells = []
    for name in dict.fromkeys(row["name"] for row in rows):
        whats = {row["what"]: row for row in rows if row["name"] == name}
        value, gradient = whats["value"], whats.get("gradient")
        line = [_name(value), _ms(value), _ratio(value["ratio"]), _error(value)]
        line.append(f"{value['temp_mib']:.2g} MiB")
        if gradient is None:
            line += ["-"] * 5
        else:
            line += [_ms(gradient), _ratio(gradient["ratio"]), _error(gradient)]
            line += [f"{gradient['compile_seconds']:.1f} s"]
            line.append(_ratio(gradient["compile_ratio"]))
        cells.append(line)
    return _markdown(header, cells)


def _recurrences(rows: list[dict[str, Any]]) -> str:
    """How many times as fast as `lax.scan`."""
    header = ["elements", "size", "batch", "", "iterations", "time", "", "error"]
    header += ["gradient", "", "error"]
    key = lambda row: tuple(row[x] for x in ("length", "size", "batch", "name"))
    cells = []
    for case in sorted(dict.fromkeys(map(key, rows)), key=lambda x: x[:3]):
        members = {row["what"]: row for row in rows if key(row) == case}
        length, size, batch, name = case
        iterations = members["value"]["iterations"]
        line = [f"{length:,}", f"{size}", f"{batch}", name]
        line.append("-" if iterations == 0 else f"{iterations}")
        for row in (members["value"], members["gradient"]):
            line += [_ms(row), _ratio(1 / row["time_ratio"]), _error(row)]
        cells.append(line)
    return _markdown(header, cells)


def _scans(rows: list[dict[str, Any]]) -> str:
    header = ["", "length", "size", "time", "memory's bandwidth", "fraction"]
    cells = [
        [
            row["name"],
            f"{row['length']:,}",
            f"{row['size']}{', diagonal' if row['diagonal'] else ''}",
            _ms(row),
            f"{row['gb_per_second']:.3g} GB/s",
            f"{100 * row['bandwidth']:.2g} %",
        ]
        for row in rows
    ]
    return _markdown(header, cells)


def _name(row):
    knob = row["knob"]
    return f"{row['name']} ({knob:,})" if knob >= 1 else f"{row['name']} ({knob:.0e})"


def _ms(row):
    low, high = row["quartiles_ms"]
    return f"{row['median_ms']:.3g} ms ({low:.3g}-{high:.3g})"


def _ratio(x):
    return f"{x:.2g} x" if x < 100 else f"{x:.0f} x"


def _error(row):
    return "not finite" if row["error"] is None else f"{row['error']:.0e}"


def _crosstab(
    corner: str,
    rows: list[dict[str, Any]],
    down: Callable[[dict[str, Any]], str],
    across: Callable[[dict[str, Any]], str],
    cell: Callable[[dict[str, Any]], str],
) -> str:
    """A cell for each row, in the line and the column that it says."""
    columns = list(dict.fromkeys(map(across, rows)))
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        lines.setdefault(down(row), {})[across(row)] = cell(row)
    cells = [
        [name, *(line.get(x, "-") for x in columns)] for name, line in lines.items()
    ]
    return _markdown([corner, *columns], cells)


def _markdown(header, cells):
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *cells))


def study(file: Path, suite: str) -> str:
    """How many iterations it took, in one suite of a study."""
    rows = json.loads(file.read_text())["rows"]
    if suite == "sdes":
        return _sdes(rows)
    rows = [row for row in rows if row["suite"] == suite]
    if suite == "large states":
        return _large(rows)
    elif suite == "devices":
        return _devices(rows)
    elif suite == "rtol":
        # Some of them. More would not fit on a page.
        rows = [row for row in rows if round(math.log10(row["rtol"])) % 3 == 0]

    def cell(row):
        if not row.get("converged", True):
            return "fails"
        iterations, error = row.get("iterations"), row.get("error")
        if suite == "everything":
            error = row["true_error"]
            return f"{error:.0e}" + (f" ({iterations})" if iterations > 0 else "")
        elif suite == "rtol":
            return f"{iterations} ({error:.0e})"
        elif suite == "guess" and "dtype" not in row:
            return f"{iterations} ({row['span']})"
        return str(iterations)

    across, down = {
        "methods": (["problem"], ["name"]),
        "guess": (["problem", "guess"], ["name", "dtype", "refine"]),
        "rtol": (["rtol"], ["problem", "name", "dtype"]),
        "damping": (["damping"], ["problem"]),
        "substeps": (["substeps"], ["name"]),
        "size": (["size"], ["name"]),
        "everything": (["substeps"], ["name", "dtype"]),
    }[suite]
    show = lambda x: f"{x:g}" if isinstance(x, float) else str(x)

    def label(row, keys):
        words = [show(row[key]) for key in keys if key in row and key != "refine"]
        if "refine" in keys and row.get("refine") and row["dtype"] != "float64":
            words.append("last step in float64")
        return ", ".join(words)

    downwards, sideways = (lambda row, k=keys: label(row, k) for keys in (down, across))
    return _crosstab("", rows, downwards, sideways, cell)


def updated(text: str) -> str:
    pattern = re.compile(
        r"(<!-- (\S+\.json)(?:, ([^>]+))? -->\n).*?(<!-- end -->)", re.DOTALL
    )

    def replace(m):
        file, part = RESULTS / m[2], m[3]
        if part is None:
            made = tables(file)
        elif part == "in short":
            made = in_short(file)
        else:
            made = study(file, part)
        return f"{m[1]}\n{made}\n\n{m[4]}"

    return pattern.sub(replace, text)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("document", type=Path)
    args = parser.parse_args()
    args.document.write_text(updated(args.document.read_text()))


if __name__ == "__main__":
    main()
