r"""What decides how many iterations `DeerSolver` makes, from a constant guess unless
another one is asked for. Nothing is timed: what is counted is the same on any device.

First all methods on all problems, each in a single window of Tsit5. Then one choice at
a time is varied: the tolerance, the guess, the damping, the number of substeps, and the
size of the state.

    python -m benchmarks.methods --output benchmarks/results/methods.json \
        --figure docs/figures/methods.png
"""

import functools as ft
from collections.abc import Sequence
from typing import Any

import diffrax as dfx
import diffrax_deer as deer
import jax
import jax.numpy as jnp
from matplotlib.axes import Axes

from . import _problems as zoo, _study as study


jax.config.update("jax_enable_x64", True)

METHODS = {
    "DEER": deer.DEER(),
    "QuasiDEER": deer.QuasiDEER(),
    "QuasiDEER, 4 samples": deer.QuasiDEER(samples=4),
    "ELK": deer.ELK(),
    "QuasiELK": deer.QuasiELK(),
    "Picard": deer.Picard(),
    "Jacobi": deer.Jacobi(),
}
RTOLS = [10.0**-n for n in range(3, 13)]
DAMPINGS = [0.0, *(10.0**-n for n in range(6, 0, -1))]
SUBSTEPS = [32, 128, 512, 2048]
SIZES = [8, 32, 128, 256]
# Of this many substeps are short windows.
SHORT = 8


def solved(problem: zoo.Problem, windows: int = 1, **kwargs: Any) -> zoo.Solve:
    """As on everything but CPUs, on which there is nothing to iterate on by default."""
    guess = kwargs.pop("guess", deer.ConstantGuess())
    return zoo.parallel(problem, windows=windows, guess=guess, **kwargs)


def methods() -> list[study.Row]:
    rows = []
    for name, problem in zoo.problems().items():
        solves = {key: solved(problem, method=m) for key, m in METHODS.items()}
        rows += study.compare(problem, solves, dict(suite="methods", problem=name))
    return rows


def tolerances() -> list[study.Row]:
    rows = []
    for name in ("van der Pol", "two bodies"):
        for method in ("DEER", "QuasiDEER"):
            make = lambda rtol: dict(
                method=METHODS[method], rtol=rtol, guess=deer.ConstantGuess()
            )
            columns = dict(suite="rtol", problem=name, name=method)
            rows += study.sweep(zoo.problems()[name], "rtol", RTOLS, make, columns)
    return rows


def dampings() -> list[study.Row]:
    rows = []
    for name in ("van der Pol", "Lorenz", "two bodies"):
        make = lambda damping: dict(
            method=deer.ELK(damping), guess=deer.ConstantGuess()
        )
        values = [*DAMPINGS, None]
        columns = dict(suite="damping", problem=name, name="ELK")
        rows += study.sweep(zoo.problems()[name], "damping", values, make, columns)
    return rows


def _nearby(problem: zoo.Problem) -> dfx.Solution:
    """The solution from an initial value that is different by 1%."""
    term, y0, args, t1, substeps = problem
    return dfx.diffeqsolve(
        *(term, dfx.Tsit5(), 0, t1, None, 1.01 * y0, args),
        stepsize_controller=dfx.StepTo(ts=jnp.linspace(0, t1, substeps + 1)),
        saveat=dfx.SaveAt(dense=True),
        max_steps=substeps,
    )


def guesses() -> list[study.Row]:
    rows = []
    problems = zoo.problems()
    problems["van der Pol"] = zoo.van_der_pol(40.0, 1024)
    for name in ("van der Pol", "two bodies"):
        problem = problems[name]
        windows = problem.substeps // SHORT
        choices: dict[str, tuple[deer.AbstractGuess, int]] = {
            "constant": (deer.ConstantGuess(), 1),
            "coarse, 1/4": (deer.CoarseGuess(steps=problem.substeps // 4), 1),
            "coarse, 1/16": (deer.CoarseGuess(steps=problem.substeps // 16), 1),
            "nested, 1 level": (deer.NestedGuess(), 1),
            "nested, 2 levels": (deer.NestedGuess(levels=2), 1),
            "nearby solution": (deer.SolutionGuess(_nearby(problem)), 1),
            "short windows, constant": (deer.ConstantGuess(), windows),
            "short windows, extrapolation": (deer.ExtrapolationGuess(), windows),
        }
        solves = {
            key: solved(problem, windows, guess=guess)
            for key, (guess, windows) in choices.items()
        }
        rows += study.compare(problem, solves, dict(suite="guess", problem=name))
    return rows


def substeps() -> list[study.Row]:
    rows = []
    for number in SUBSTEPS:
        problem = zoo.two_body(substeps=number)
        solves = {
            key: solved(problem, method=METHODS[key]) for key in ("DEER", "QuasiDEER")
        }
        columns = dict(suite="substeps", problem="two bodies", substeps=number)
        rows += study.compare(problem, solves, columns)
    return rows


def sizes() -> list[study.Row]:
    rows = []
    for size in SIZES:
        problem = zoo.neural(size)
        names = ("DEER", "QuasiDEER", "QuasiDEER, 4 samples", "ELK", "Picard")
        solves = {key: solved(problem, method=METHODS[key]) for key in names}
        columns = dict(suite="size", problem="neural", size=size)
        rows += study.compare(problem, solves, columns)
    return rows


def draw(rows: Sequence[study.Row], panels: list[Axes]) -> None:
    series = ft.partial(study.series, rows)
    rtol, damping, guess, size = panels

    for color, problem in enumerate(("van der Pol", "two bodies")):
        for style, name in (("o-", "DEER"), ("s--", "QuasiDEER")):
            where = dict(suite="rtol", problem=problem, name=name)
            data = series("rtol", "iterations", **where)
            rtol.plot(*data, style, color=f"C{color}", label=f"{problem}, {name}")
    rtol.set(xscale="log", yscale="log", xlabel="rtol", ylabel="iterations")
    rtol.set_title("Tolerance")
    rtol.invert_xaxis()
    rtol.legend()

    for problem in ("van der Pol", "Lorenz", "two bodies"):
        where = dict(suite="damping", problem=problem, converged=True)
        (line,) = damping.plot(*series("damping", "iterations", **where), "o-")
        (best,) = series("iterations", "iterations", damping=None, **where)[0]
        line.set_label(f"{problem} (None: {best})")
        damping.axhline(best, color=line.get_color(), ls=":", lw=1)
    damping.set_xscale("symlog", linthresh=1e-6)
    damping.set(yscale="log", xlabel="damping", ylabel="iterations", xlim=(-3e-7, 0.2))
    damping.set_ylim(2)
    damping.set_title("Damping of ELK (constant guess)")
    damping.legend(loc="lower left")

    names = []
    for marker, problem in zip("o^", ("van der Pol", "two bodies")):
        where = dict(suite="guess", problem=problem, converged=True)
        names, spans = series("name", "span", **where)
        guess.plot(spans, range(len(names)), marker, label=problem)
    guess.set_yticks(range(len(names)), names)
    guess.invert_yaxis()
    guess.set(xscale="log", xlabel="span")
    guess.set_title("Guess")
    guess.legend()

    for name in dict.fromkeys(row["name"] for row in rows if row["suite"] == "size"):
        data = series("size", "iterations", suite="size", name=name)
        size.plot(*data, "s:" if name == "ELK" else "o-", label=name)
    size.set(xscale="log", yscale="log", xlabel="size of the state")
    size.set_ylabel("iterations")
    size.set_title("Size of the state")
    size.set_ylim(4, 200)
    size.legend(loc="upper left", ncols=2)


def main():
    args = study.arguments(__doc__)
    rows = methods() + tolerances() + dampings() + guesses() + substeps() + sizes()
    study.show(rows)
    study.save(args, rows)
    study.figure(args.figure, (2, 2), ft.partial(draw, rows))


if __name__ == "__main__":
    main()
