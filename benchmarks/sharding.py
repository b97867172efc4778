"""The time axis over several devices: what each of them holds and exchanges.

A driven, damped oscillator, its final value and the gradient, in a single window of
`Heun`. On a CPU the devices are parts of it, so that times say nothing about
several real ones, but memory and what is exchanged do. Both are read from the compiled
program. What would take more than `--max-gib` altogether is only compiled.

    python -m benchmarks.sharding --output benchmarks/results/sharding_cpu.json
"""

import argparse
import math
import re
from pathlib import Path
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
from diffrax_deer import DeerAdjoint, DeerSolver
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from . import _study as study
from ._timing import measure, print_environment


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)

_T1 = 20.0
_BYTES = dict(f64=8, s64=8, f32=4, s32=4, u32=4, pred=1)
# So that coarser grids can be divided as well.
SUBSTEPS = (10_240, 81_920, 655_360, 10_485_760)
_COLLECTIVES = ("all-gather", "all-reduce", "collective-permute", "all-to-all")


def field(t, y, args):
    x, v = y
    return jnp.stack([v, args * jnp.cos(t) - 0.5 * v - x - x**3])


def gradient(solver: dfx.AbstractSolver, steps: int):
    """The final value of a component, and its derivatives."""

    def value(y0, args):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            *(solver, 0.0, _T1, _T1 / steps, y0, args),
            adjoint=DeerAdjoint(max_windows=steps),
            max_steps=steps,
        )
        assert sol.ys is not None
        return sol.ys[0, 0]

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))


def exchanged(program: str) -> dict[str, int]:
    """How many bytes the collective operations of a program put out, each made once."""
    total: dict[str, int] = {name: 0 for name in _COLLECTIVES}
    pattern = rf"= (.*?) ({'|'.join(_COLLECTIVES)})(?:-start)?\("
    for shapes, name in re.findall(pattern, program):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            sizes = [int(x) for x in shape.split(",") if x]
            total[name] += _BYTES[dtype] * math.prod(sizes)
    return total


def row(substeps: int, devices: int, max_gib: float, repeats: int) -> study.Row:
    mesh = jax.make_mesh(
        (devices,),
        ("time",),
        devices=jax.devices()[:devices],
        axis_types=(AxisType.Auto,),
    )
    sharding = NamedSharding(mesh, PartitionSpec("time"))
    inputs = jnp.array([1.0, 0.0]), jnp.array(0.3)
    solver = DeerSolver(dfx.Heun(), substeps, sharding=sharding)
    joint = gradient(solver, 1)
    compiled: Any = joint.lower(*inputs).compile()
    per_device = compiled.memory_analysis().temp_size_in_bytes
    out = dict(
        suite="devices",
        substeps=substeps,
        devices=devices,
        mib_per_device=per_device / 2**20,
        exchanged_bytes=exchanged(compiled.as_text()),
    )
    if devices * per_device > max_gib * 2**30:
        return out
    timing = measure(
        {"": joint}, *inputs, repeats=repeats, compile_repeats=1, max_seconds=1.0
    )[""]
    expected = gradient(dfx.Heun(), substeps)(*inputs)
    return out | dict(**timing.columns, error=difference(timing.output, expected))


def difference(actual, expected) -> float:
    relative = lambda x, y: float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y)))
    return max(jax.tree.leaves(jax.tree.map(relative, actual, expected)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--substeps", type=int, nargs="*", default=SUBSTEPS)
    parser.add_argument("--devices", type=int, nargs="*", default=(1, 2, 4, 8))
    parser.add_argument("--max-gib", type=float, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args()

    print_environment()
    rows = []
    for substeps in args.substeps:
        for devices in args.devices:
            rows.append(row(substeps, devices, args.max_gib, args.repeats))
            study.save(args, rows)
            study.show(rows[-1:])


if __name__ == "__main__":
    main()
