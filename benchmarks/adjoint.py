"""Saving and backpropagating with `DeerAdjoint`, and with Diffrax's default.

The two-body problem with 10,001 save points, and its derivative with respect to the
initial value. Then the same number of constant steps, as a drop-in for Tsit5: of these
all are saved. `--output FILE.json` also saves the tables.
"""

import argparse
from pathlib import Path

import diffrax as dfx
import jax
import jax.numpy as jnp
from diffrax_deer import DeerAdjoint, DeerSolver

from . import _study as study
from ._timing import measure, print_environment
from ._two_body import exact, initial_value, T, term


jax.config.update("jax_enable_x64", True)

SUBSTEPS = 128
STEPS = 10_000
# The number of steps of the long adaptive solve, and its length.
LONG = 10 * T

default = dfx.RecursiveCheckpointAdjoint()
y0 = initial_value()
ts = jnp.linspace(0, T, STEPS + 1)


def one_window(adjoint, max_steps):
    def solve(y0):
        solver = DeerSolver(dfx.Tsit5(), SUBSTEPS)
        return dfx.diffeqsolve(
            *(term, solver, 0, T, T, y0),
            saveat=dfx.SaveAt(ts=ts),
            adjoint=adjoint,
            max_steps=max_steps,
        ).ys

    return solve


def adaptive(adjoint, tol, t1=T, saveat=dfx.SaveAt(ts=ts)):
    def solve(y0):
        return dfx.diffeqsolve(
            *(term, dfx.Tsit5(), 0, t1, None, y0),
            stepsize_controller=dfx.PIDController(rtol=tol, atol=tol),
            saveat=saveat,
            adjoint=adjoint,
        ).ys

    return solve


def constant_steps(adjoint, solver):
    def solve(y0):
        return dfx.diffeqsolve(
            *(term, solver, 0, T, T / STEPS, y0),
            saveat=dfx.SaveAt(t0=True, steps=True),
            adjoint=adjoint,
            max_steps=STEPS,
        ).ys

    return solve


def loss_and_grad(solve):
    return jax.value_and_grad(lambda y0: jnp.sum(jnp.sin(solve(y0))))


end = dfx.SaveAt(t1=True)
one_step = DeerSolver(dfx.Tsit5(), substeps=1)
# In each of them, the first one is what the others are compared with.
suites = {
    "10,001 saves": {
        "DEER, default adjoint": one_window(default, 1),
        "DEER, DeerAdjoint": one_window(DeerAdjoint(), 1),
        "the same without max_steps": one_window(DeerAdjoint(), 4096),
        "Tsit5 (1e-6), default adjoint": adaptive(default, 1e-6),
        "Tsit5 (1e-8), default adjoint": adaptive(default, 1e-8),
        "Tsit5 (1e-8), DeerAdjoint": adaptive(DeerAdjoint(), 1e-8),
    },
    "10,000 constant steps": {
        "Tsit5, default adjoint": constant_steps(default, dfx.Tsit5()),
        "Tsit5, DeerAdjoint": constant_steps(DeerAdjoint(), dfx.Tsit5()),
        "DEER, DeerAdjoint": constant_steps(DeerAdjoint(), one_step),
        "the same by 256 points": constant_steps(
            DeerAdjoint(max_window_points=256), one_step
        ),
    },
    "adaptive steps, ten times longer, final value": {
        "Tsit5 (1e-8), default adjoint": adaptive(default, 1e-8, LONG, end),
        "Tsit5 (1e-8), DeerAdjoint": adaptive(DeerAdjoint(), 1e-8, LONG, end),
    },
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args()

    reference = exact(y0, ts)
    assert reference is not None
    print_environment()
    rows = []
    for suite, solves in suites.items():
        for what, functions in (
            ("value", solves),
            (
                "value and gradient",
                {name: loss_and_grad(solve) for name, solve in solves.items()},
            ),
        ):
            timings = measure(functions, y0, repeats=args.repeats)
            first = next(iter(timings.values()))
            print(f"\n{suite}: {what}")
            print(f"{'':32}{'median':>10}{'quartiles':>20}{'ratio':>8}{'compile':>10}")
            for name, timing in timings.items():
                low, high = timing.spread
                row = dict(
                    suite=suite,
                    what=what,
                    name=name,
                    **timing.columns,
                    time_ratio=timing.median / first.median,
                    compile_seconds=timing.compile_seconds,
                )
                quartiles = f"{1e3 * low:.3f}-{1e3 * high:.3f}"
                line = (
                    f"{name:32}{row['median_ms']:7.3f} ms{quartiles:>17} ms"
                    f"{row['time_ratio']:8.3f}{timing.compile_seconds:8.2f} s"
                )
                if what == "value" and len(timing.output) == len(reference):
                    row["error"] = float(jnp.max(jnp.abs(timing.output - reference)))
                    line += f"   error {row['error']:.1e}"
                rows.append(row)
                print(line)
    study.save(args, rows)


if __name__ == "__main__":
    main()
