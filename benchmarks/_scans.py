"""The linear recurrence alone, and how close it comes to the memory's bandwidth."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jax.random as jr
from diffrax_deer import AbstractScan, AssociativeScan, KernelScan, SequentialScan

from . import _study as study
from ._timing import measure


_TIMES = 10


def compare(
    length: int, size: int, is_diagonal: bool, repeats: int, max_seconds: float
) -> list[study.Row]:
    """In single precision. What is compared with is the bandwidth of a copy, by which
    all terms would be read once, and all values written once."""
    shape = (length, size) if is_diagonal else (length, size, size)
    # Not growing.
    A = jr.normal(jr.key(0), shape, jnp.float32) / (2 * size**0.5)
    b = jr.normal(jr.key(1), (length, size), jnp.float32)
    scans: dict[str, AbstractScan] = {"AssociativeScan": AssociativeScan()}
    if jax.default_backend() == "gpu":
        scans["KernelScan"] = KernelScan()
    else:
        scans["SequentialScan"] = SequentialScan()
    # As many bytes as there are to be read and written at least.
    necessary = (A.size + 2 * b.size) * A.itemsize
    copied = 2 * (A.size + b.size) * A.itemsize
    copy = lambda A__b: jax.tree_util.tree_map(lambda x: 1.001 * x, A__b)
    solves = {
        "copy": copy,
        **{
            # The next one is of the last one's values.
            name: lambda A__b, scan=scan: (A__b[0], scan(*A__b))
            for name, scan in scans.items()
        },
    }
    timings = measure(
        {name: functools.partial(_repeatedly, fn) for name, fn in solves.items()},
        *(A, b),
        repeats=repeats,
        compile_repeats=1,
        max_seconds=max_seconds,
    )
    timings = {
        name: dataclasses.replace(timing, seconds=timing.seconds / _TIMES)
        for name, timing in timings.items()
    }
    bandwidth = copied / timings["copy"].median
    wide = lambda x: x.astype(jnp.float64)
    expected = AssociativeScan()(wide(A), wide(b))
    errors = {
        name: study.distance(jax.jit(scan)(A, b), expected)
        for name, scan in scans.items()
    }
    rows = [
        dict(
            suite="linear recurrence",
            name=name,
            length=length,
            size=size,
            diagonal=is_diagonal,
            **timing.columns,
            gb_per_second=1e-9 * bytes_moved / timing.median,
            bandwidth=bytes_moved / timing.median / bandwidth,
            temp_mib=timing.temp_bytes / 2**20,
            error=errors.get(name),
        )
        for name, timing in timings.items()
        for bytes_moved in [copied if name == "copy" else necessary]
    ]
    study.show(rows)
    return rows


def _repeatedly(fn, A, b):
    # So often, that starting it does not matter.
    return jax.lax.fori_loop(0, _TIMES, lambda _, A__b: fn(A__b), (A, b))


def sizes(suite: str) -> list[tuple[int, int, bool]]:
    """`(length, size, is_diagonal)`."""
    if suite == "quick":
        return [(10_000, 8, False)]
    length = 10**6 if suite == "gpu" else 10**5
    full = [(length, size, False) for size in (1, 2, 4, 8, 16)]
    return [*full, (length, 8, True)]
