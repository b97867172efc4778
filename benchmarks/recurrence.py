"""A GRU over long sequences, with `deer_scan` and with `jax.lax.scan`.

Time, iterations and memory, of the final state and of its gradient with respect to all
parameters, on whatever device there is. With random parameters and inputs, in single
precision. `--output FILE.json` also saves the table.
"""

import argparse
import functools as ft
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from diffrax_deer import DEER, deer_scan_solution, QuasiDEER
from jax import lax

from . import _study as study
from ._timing import measure, print_environment


# As in the other benchmarks, so that rounding errors can be told from others.
jax.config.update("jax_default_matmul_precision", "highest")

INPUTS = 6
# What is estimated to need more memory for its Jacobians is left out.
MAX_GIB = 40 if jax.default_backend() == "gpu" else 4

methods = dict(DEER=DEER(), QuasiDEER=QuasiDEER())


def gru(size, length, batch):
    cell = eqx.nn.GRUCell(INPUTS, size, key=jr.key(0))
    xs = jr.normal(jr.key(1), (batch, length, INPUTS))
    return eqx.partition(cell, eqx.is_array), xs


def with_scan(static, size, params, xs):
    cell = eqx.combine(params, static)
    f = lambda h, x: (cell(x, h), None)
    scan = lambda xs: lax.scan(f, jnp.zeros(size), xs)[0]
    return jax.vmap(scan)(xs), jnp.zeros((), jnp.int32)


def with_deer(method, static, size, params, xs):
    cell = eqx.combine(params, static)
    f = lambda h, x: (cell(x, h), None)

    def scan(xs):
        solution = deer_scan_solution(f, jnp.zeros(size), xs, method=method)
        return solution.carry, solution.num_iterations

    carry, num_iterations = jax.vmap(scan)(xs)
    return carry, jnp.max(num_iterations)


def loss_and_grad(solve):
    def loss(params, xs):
        carry, num_iterations = solve(params, xs)
        return jnp.sum(jnp.sin(carry)), num_iterations

    def fn(params, xs):
        (_, num_iterations), grad = jax.value_and_grad(loss, has_aux=True)(params, xs)
        return grad, num_iterations

    return fn


def jacobians_gib(method, size, length, batch):
    per_element = size**2 if method == "DEER" else size
    return 4 * batch * length * per_element * np.dtype(np.float32).itemsize / 2**30


def compare(length, size, batch, repeats):
    (params, static), xs = gru(size, length, batch)
    solves = {"lax.scan": ft.partial(with_scan, static, size)}
    for name, method in methods.items():
        gib = jacobians_gib(name, size, length, batch)
        if gib <= MAX_GIB:
            solves[name] = ft.partial(with_deer, method, static, size)
        else:
            print(f"{name} left out: it would need about {gib:.0f} GiB.")
    rows = []
    for what, functions in (
        ("value", solves),
        ("gradient", {name: loss_and_grad(solve) for name, solve in solves.items()}),
    ):
        timings = measure(functions, params, xs, repeats=repeats, compile_repeats=1)
        reference = timings["lax.scan"]
        for name, timing in timings.items():
            output, num_iterations = timing.output
            row = dict(
                length=length,
                size=size,
                batch=batch,
                what=what,
                name=name,
                **timing.columns,
                time_ratio=timing.median / reference.median,
                iterations=int(num_iterations),
                error=study.distance(output, reference.output[0]),
                temp_mib=timing.temp_bytes / 2**20,
                compile_seconds=timing.compile_seconds,
            )
            rows.append(row)
            print(
                f"{length:7} {size:4} {batch:4}  {what:9} {name:10}"
                f"{row['median_ms']:10.2f} ms{row['time_ratio']:9.2f} x"
                f"{row['iterations']:6} iterations{row['temp_mib']:9.1f} MiB"
                f"   error {row['error']:.0e}"
            )
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("--lengths", [1000, 10_000, 100_000]),
        ("--sizes", [1, 8, 64]),
        ("--batches", [1, 16]),
    ):
        parser.add_argument(name, type=int, nargs="+", default=default)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args()

    print_environment()
    print(" length size batch")
    rows = []
    for length in args.lengths:
        for size in args.sizes:
            for batch in args.batches:
                rows += compare(length, size, batch, args.repeats)
                study.save(args, rows)


if __name__ == "__main__":
    main()
