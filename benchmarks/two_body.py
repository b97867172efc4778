"""Two bodies on nearly circular orbits, twice around: DEER and Diffrax's Tsit5.

DEER solves the whole interval as a single window, to an error of about 1e-6. Tsit5 is
adaptive, at a relative tolerance of 1e-6 for every step: its error is larger, and in
the table. `--output FILE.json` also saves its content.
"""

import argparse
import json
from pathlib import Path

import diffrax as dfx
import jax
import jax.numpy as jnp
from _timing import environment, measure
from _two_body import exact, initial_value, T, term
from diffrax_deer import ConstantGuess, DeerSolver


jax.config.update("jax_enable_x64", True)

SUBSTEPS = 128
SAVES = 10_001
y0 = initial_value()
ts = jnp.linspace(0, T, SAVES)


def tsit5(y0, saveat=dfx.SaveAt(ts=ts)):
    """The solution at 10,001 points, saved as it goes."""
    controller = dfx.PIDController(rtol=1e-6, atol=1e-6)
    return dfx.diffeqsolve(
        term,
        dfx.Tsit5(),
        0,
        T,
        None,
        y0,
        stepsize_controller=controller,
        saveat=saveat,
    ).ys


def tsit5_end(y0):
    """The solution at the end."""
    return tsit5(y0, dfx.SaveAt(t1=True))


def _deer(y0, saveat, **kwargs):
    solver = DeerSolver(dfx.Tsit5(), SUBSTEPS, **kwargs)
    return dfx.diffeqsolve(term, solver, 0, T, T, y0, saveat=saveat, max_steps=1)


def deer(y0):
    """The solution at the end."""
    return _deer(y0, dfx.SaveAt(t1=True)).ys


def deer_constant_guess(y0):
    """The same from a constant guess, rather than from a few large steps."""
    return _deer(y0, dfx.SaveAt(t1=True), guess=ConstantGuess()).ys


def deer_dense(y0):
    """The solution at 10,001 points, evaluated in one batch."""
    sol = _deer(y0, dfx.SaveAt(dense=True))
    return jax.vmap(sol.evaluate)(ts)


def value_and_grad(fn):
    return jax.value_and_grad(lambda y0: jnp.sum(fn(y0)[-1]))


def num_iterations(y0, **kwargs):
    saveat = dfx.SaveAt(t1=True, solver_state=True)
    state = _deer(y0, saveat, **kwargs).solver_state
    assert state is not None
    return int(state.num_iterations)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args()

    reference = exact(y0, ts)
    assert reference is not None
    solutions = {
        "Tsit5, 10,001 saves": tsit5,
        "Tsit5": tsit5_end,
        "DEER": deer,
        "DEER, constant guess": deer_constant_guess,
        "DEER, 10,001 saves": deer_dense,
    }
    gradients = {
        "Tsit5, 10,001 saves: gradient": value_and_grad(tsit5),
        "Tsit5: gradient": value_and_grad(tsit5_end),
        "DEER: gradient": value_and_grad(deer),
    }
    tables = [
        measure(group, y0, repeats=args.repeats) for group in (solutions, gradients)
    ]
    env = environment()
    print(", ".join(f"{name} {version}" for name, version in env.items()))
    print(
        f"iterations: {num_iterations(y0)}, "
        f"from a constant guess: {num_iterations(y0, guess=ConstantGuess())}\n"
    )
    print(
        f"{'':30}{'median':>10}{'quartiles':>20}{'ratio':>8}"
        f"{'compile':>10}{'ratio':>8}{'error':>10}"
    )
    rows = []
    for timings in tables:
        first = next(iter(timings.values()))
        for name, timing in timings.items():
            low, high = timing.spread
            row = dict(
                name=name,
                median_ms=1e3 * timing.median,
                quartiles_ms=[1e3 * low, 1e3 * high],
                speed_ratio=first.median / timing.median,
                compile_seconds=timing.compile_seconds,
                compile_ratio=timing.compile_seconds / first.compile_seconds,
            )
            error = ""
            if name in solutions:
                ys = timing.output
                row["error"] = float(jnp.max(jnp.abs(ys - reference[-len(ys) :])))
                error = f"{row['error']:10.1e}"
            rows.append(row)
            quartiles = f"{1e3 * low:.3f}-{1e3 * high:.3f}"
            print(
                f"{name:30}{row['median_ms']:7.3f} ms{quartiles:>17} ms"
                f"{row['speed_ratio']:7.1f}x{timing.compile_seconds:8.2f} s"
                f"{row['compile_ratio']:7.1f}x{error}"
            )
    if args.output is not None:
        args.output.write_text(json.dumps(dict(env=env, rows=rows), indent=2) + "\n")


if __name__ == "__main__":
    main()
