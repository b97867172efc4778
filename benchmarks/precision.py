r"""Which parts of `DeerSolver` need how much precision. Nothing is timed.

First everything in single or in double precision. Then only the scan, that is the
linear recurrence between the substeps, in low precision, and all else in double
precision: it only makes a correction, and its errors are corrected by the next one. Is
that so also from a bad guess?

    python -m benchmarks.precision --output benchmarks/results/precision.json \
        --figure docs/figures/precision.png
"""

import functools as ft
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from diffrax_deer import (
    AbstractScan,
    AutoScan,
    CoarseGuess,
    ConstantGuess,
)
from jaxtyping import Array
from matplotlib.axes import Axes
from tqdm import tqdm

from . import _problems as zoo, _study as study


jax.config.update("jax_enable_x64", True)

SUBSTEPS = [32, 128, 512, 2048]
RTOLS = [10.0**-n for n in range(3, 13)]
DTYPES = ["float64", "float32", "bfloat16"]
PROBLEMS = ["van der Pol", "Lorenz", "two bodies"]


class LowPrecisionScan(AbstractScan):
    """Evaluates the linear recurrence in another precision than that of its inputs.

    If `refine`, then it is applied once more in full precision, to all terms in
    parallel. Wherever the values before a term are zero, this gives the right-hand side
    to the last bit: the substep behind those that are known already becomes exact, so
    that the iteration ends in any case.
    """

    dtype: str
    refine: bool = True
    scan: AbstractScan = AutoScan()

    def __call__(self, A: Array, b: Array, *, reverse: bool = False) -> Array:
        x = self.scan(self._low(A), self._low(b), reverse=reverse).astype(b.dtype)
        if not self.refine:
            return x
        if reverse:
            before = jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])
        else:
            before = jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])
        if A.ndim == b.ndim:
            return A * before + b
        else:
            return jnp.einsum("nij,nj->ni", A, before) + b

    def _low(self, x):
        # Never to infinity, which times zero would not be zero.
        largest = float(jnp.finfo(self.dtype).max)
        return jnp.clip(x, -largest, largest).astype(self.dtype)


def whole() -> list[study.Row]:
    rows = []
    fine = zoo.two_body(substeps=2**14)
    true = jax.jit(zoo.reference(fine))(*fine.inputs)
    for number in SUBSTEPS:
        problem = zoo.two_body(substeps=number)
        same_grid = jax.jit(zoo.reference(problem))(*problem.inputs)
        solvers = {
            "Tsit5": zoo.sequential(problem),
            "DEER": zoo.parallel(problem, guess=ConstantGuess()),
        }
        for name, solve in solvers.items():
            for dtype in ("float64", "float32"):
                solved = jax.jit(_with_dtype(solve, dtype))(*problem.inputs)
                row: study.Row = dict(substeps=number, name=name, dtype=dtype)
                row |= study.outcome(solved, same_grid)
                row["true_error"] = zoo.error(solved.y1, true)
                rows.append(dict(suite="everything", **row))
    return rows


def _with_dtype(solve, dtype):
    return lambda y0, args: solve(y0.astype(dtype), args)


def tolerances() -> list[study.Row]:
    rows = []
    for name in ("van der Pol", "two bodies"):
        for dtype in DTYPES:
            make = lambda rtol: dict(
                scan=LowPrecisionScan(dtype), rtol=rtol, guess=ConstantGuess()
            )
            columns = dict(suite="rtol", problem=name, dtype=dtype)
            rows += study.sweep(zoo.problems()[name], "rtol", RTOLS, make, columns)
    return rows


def guesses() -> list[study.Row]:
    rows = []
    scans = [LowPrecisionScan("float64")]
    scans += [
        LowPrecisionScan(x, refine) for x in DTYPES[1:] for refine in (False, True)
    ]
    for name in PROBLEMS:
        problem = zoo.problems()[name]
        true = jax.jit(zoo.reference(problem))(*problem.inputs)
        for scan in tqdm(scans, unit="scan"):
            steps = problem.substeps // 4
            for guess in (CoarseGuess(steps=steps), ConstantGuess()):
                solve = jax.jit(zoo.parallel(problem, scan=scan, guess=guess))
                row = dict(suite="guess", problem=name, guess=type(guess).__name__)
                row |= dict(dtype=scan.dtype, refine=scan.refine)
                rows.append(row | study.outcome(solve(*problem.inputs), true))
    return rows


def draw(rows: Sequence[study.Row], panels: list[Axes]) -> None:
    series = ft.partial(study.series, rows)
    everything, iterations, errors = panels
    look: dict[str, Any]

    for color, dtype in enumerate(("float64", "float32")):
        for style, name in (("o-", "DEER"), ("x--", "Tsit5")):
            where = dict(suite="everything", name=name, dtype=dtype)
            look = dict(color=f"C{color}", label=f"{name}, {dtype}")
            everything.plot(*series("substeps", "true_error", **where), style, **look)
    everything.set(xscale="log", yscale="log", xlabel="substeps", ylabel="error")
    everything.set_title("Everything in this precision: two bodies")
    everything.legend()

    for color, dtype in enumerate(DTYPES):
        where = dict(suite="rtol", problem="two bodies", dtype=dtype)
        # The first two hardly differ.
        look = dict(color=f"C{color}", label=dtype, lw=4 - 1.5 * color)
        iterations.plot(*series("rtol", "iterations", **where), "o-", **look)
        errors.plot(*series("rtol", "error", **where), "o-", **look)
    for panel, label in ((iterations, "iterations"), (errors, "error")):
        panel.set(xscale="log", xlabel="rtol", ylabel=label)
        panel.set_title(f"Only the scan in this precision: {label}")
        panel.invert_xaxis()
        panel.legend()
    iterations.set_ylim(0)
    errors.set_yscale("log")


def main():
    args = study.arguments(__doc__)
    rows = whole() + tolerances() + guesses()
    study.show(rows)
    study.save(args, rows)
    study.figure(args.figure, (1, 3), ft.partial(draw, rows))


if __name__ == "__main__":
    main()
