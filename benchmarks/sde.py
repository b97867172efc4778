"""Stochastic differential equations with constant steps, as users write them.

All steps are saved: as it is, with `adjoint=DeerAdjoint()`, and with
`DeerSolver(solver, substeps=1)` in addition. And the gradient with respect to the
initial value. `--output FILE.json` also saves the table.
"""

import argparse
from pathlib import Path

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
from diffrax_deer import DeerAdjoint, DeerSolver

from . import _study as study
from ._timing import measure, print_environment


jax.config.update("jax_enable_x64", True)

default = dfx.RecursiveCheckpointAdjoint()
increment, area = dfx.BrownianIncrement, dfx.SpaceTimeLevyArea
# How many steps and components, the solver, and what it needs to know of the noise.
suites = {
    "1,000 steps of Euler": (1_000, 1, dfx.Euler(), increment),
    "10,000 steps of Euler": (10_000, 1, dfx.Euler(), increment),
    "10,000 steps of Euler, 32 components": (10_000, 32, dfx.Euler(), increment),
    "10,000 steps of Heun": (10_000, 1, dfx.Heun(), increment),
    "10,000 steps of ShARK": (10_000, 1, dfx.ShARK(), area),
}


def problem(solver, adjoint, levy_area, steps):
    def solve(y0, key):
        # As fine a tree as these steps need.
        tol = 2.0 ** -np.ceil(np.log2(2 * steps))
        path = dfx.VirtualBrownianTree(0, 1, tol, y0.shape, key, levy_area)
        diffusion = lambda t, y, args: lx.DiagonalLinearOperator(jnp.full_like(y, 0.3))
        terms = dfx.MultiTerm(
            dfx.ODETerm(lambda t, y, args: -jnp.sin(y)),
            dfx.ControlTerm(diffusion, path),
        )
        return dfx.diffeqsolve(
            *(terms, solver, 0, 1, 1 / steps, y0),
            saveat=dfx.SaveAt(steps=True),
            adjoint=adjoint,
            max_steps=steps,
        ).ys

    return solve


def value_and_grad(solve):
    return jax.value_and_grad(lambda y0, key: jnp.sum(jnp.sin(solve(y0, key))))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args()

    print_environment()
    rows = []
    for suite, (steps, size, solver, levy_area) in suites.items():
        deer = DeerSolver(solver, substeps=1)
        solves = {
            "default adjoint": problem(solver, default, levy_area, steps),
            "DeerAdjoint": problem(solver, DeerAdjoint(), levy_area, steps),
            "DEER, DeerAdjoint": problem(deer, DeerAdjoint(), levy_area, steps),
        }
        gradients = {name: value_and_grad(solve) for name, solve in solves.items()}
        inputs = jnp.ones(size), jr.key(0)
        for what, functions in (("value", solves), ("value and gradient", gradients)):
            timings = measure(
                functions, *inputs, repeats=args.repeats, compile_repeats=1
            )
            first = timings["default adjoint"]
            print(f"\n{suite}: {what}")
            for name, timing in timings.items():
                row = dict(
                    suite=suite,
                    what=what,
                    name=name,
                    **timing.columns,
                    time_ratio=timing.median / first.median,
                )
                if what == "value":
                    error = jnp.max(jnp.abs(timing.output - first.output))
                    row["difference"] = float(error)
                rows.append(row)
                times = first.median / timing.median
                print(f"{name:20}{row['median_ms']:10.2f} ms{times:8.1f} times as fast")
    study.save(args, rows)


if __name__ == "__main__":
    main()
