"""Measures functions side by side, as only their ratios mean something."""

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from tqdm import tqdm


_Name = TypeVar("_Name")


@dataclasses.dataclass(frozen=True)
class Timing:
    compile_seconds: float
    seconds: np.ndarray
    output: Any
    # What XLA allocates beside inputs and outputs.
    temp_bytes: int

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(low), float(high)


def measure(
    functions: dict[_Name, Callable], *args, repeats: int, compile_repeats: int = 3
) -> dict[_Name, Timing]:
    """Compiles every function, then calls them in turn: whatever else the machine does
    meanwhile, it does to all of them.

    The first compilation of a process also pays for JAX's own start, so that functions
    are compiled several times, in turn, without caches, of which the median is taken.
    (If only once, then this time is of no interest, and JAX may keep its caches.)
    """
    progress = tqdm(total=len(functions) * (compile_repeats + repeats), unit="run")
    compiled = {}
    compile_seconds = {name: [] for name in functions}
    for _ in range(compile_repeats):
        for name, fn in functions.items():
            if compile_repeats > 1:
                jax.clear_caches()
            start = time.perf_counter()
            compiled[name] = jax.jit(fn).lower(*args).compile()
            compile_seconds[name].append(time.perf_counter() - start)
            progress.update()
    outputs = {name: jax.block_until_ready(fn(*args)) for name, fn in compiled.items()}
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, fn in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(fn(*args))
            seconds[name].append(time.perf_counter() - start)
            progress.update()
    progress.close()
    return {
        name: Timing(
            float(np.median(compile_seconds[name])),
            np.array(seconds[name]),
            outputs[name],
            compiled[name].memory_analysis().temp_size_in_bytes,
        )
        for name in functions
    }


def environment() -> dict[str, str]:
    device = jax.devices()[0]
    packages = ("diffrax-deer", "diffrax", "equinox", "jax", "jaxlib")
    return {
        "device": f"{device.platform} ({device.device_kind})",
        **{name: importlib.metadata.version(name) for name in packages},
    }
