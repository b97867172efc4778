"""The linear recurrence alone, and how close it comes to the memory's bandwidth."""

import jax
import jax.numpy as jnp
import jax.random as jr
from diffrax_deer import AbstractScan, AssociativeScan, KernelScan, SequentialScan

from . import _study as study
from ._timing import measure


def compare(
    length: int, size: int, is_diagonal: bool, repeats: int, max_seconds: float
) -> list[study.Row]:
    """In single precision. What is compared with is a copy of as many bytes as the
    recurrence has to read and write at least: what the memory can do at best."""
    shape = (length, size) if is_diagonal else (length, size, size)
    # Not growing.
    A = jr.normal(jr.key(0), shape, jnp.float32) / (2 * size**0.5)
    b = jr.normal(jr.key(1), (length, size), jnp.float32)
    scans: dict[str, AbstractScan] = {
        "AssociativeScan": AssociativeScan(),
        "SequentialScan": SequentialScan(),
    }
    if jax.default_backend() == "gpu":
        scans["KernelScan"] = KernelScan()
    copied = (A.size + 2 * b.size) // 2
    solves = {
        # Not a copy that XLA could leave out.
        "copy": lambda A, b: jnp.concatenate([A.ravel(), b.ravel()])[:copied] * 2,
        **{name: lambda A, b, scan=scan: scan(A, b) for name, scan in scans.items()},
    }
    timings = measure(
        *(solves, A, b), repeats=repeats, compile_repeats=1, max_seconds=max_seconds
    )
    expected = timings["SequentialScan"].output
    rows = [
        dict(
            suite="linear recurrence",
            name=name,
            length=length,
            size=size,
            diagonal=is_diagonal,
            **timing.columns,
            bandwidth=timings["copy"].median / timing.median,
            gb_per_second=2e-9 * copied * 4 / timing.median,
            temp_mib=timing.temp_bytes / 2**20,
            error=None if name == "copy" else study.distance(timing.output, expected),
        )
        for name, timing in timings.items()
    ]
    study.show(rows)
    return rows


def sizes(suite: str) -> list[tuple[int, int, bool]]:
    """`(length, size, is_diagonal)`."""
    if suite == "quick":
        return [(10_000, 8, False)]
    length = 10**6 if suite == "gpu" else 10**5
    full = [(length, size, False) for size in (1, 2, 4, 8, 16)]
    return [*full, (length, 8, True), (length, 64, True)]
