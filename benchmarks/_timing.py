"""Measures functions side by side, as only their ratios mean something."""

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import numpy as np
from tqdm import tqdm


_Name = TypeVar("_Name")
# A slow function is called this often.
_MIN_REPEATS = 3


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

    @property
    def columns(self) -> dict[str, Any]:
        """What a table says of it."""
        return dict(
            median_ms=1e3 * self.median, quartiles_ms=[1e3 * x for x in self.spread]
        )


def measure(
    functions: dict[_Name, Callable],
    *args,
    repeats: int,
    compile_repeats: int = 3,
    cold: bool | None = None,
    more_args: Mapping[_Name, tuple] = MappingProxyType({}),
    max_seconds: float = float("inf"),
    on_host: Collection[_Name] = (),
) -> dict[_Name, Timing]:
    """Compiles every function (but those `on_host`), then calls them in turn: whatever
    else the machine does meanwhile, it does to all of them. Those that have taken more
    than `max_seconds` take part no longer.

    The first compilation of a process also pays for JAX's own start, so that functions
    are compiled several times, in turn, without caches, of which the median is taken.
    (If only once, then this time is of no interest, and JAX may keep its caches, unless
    `cold`.)

    A function may occur with several `more_args`, and is compiled for these only once.
    """
    arguments = {name: (*args, *more_args.get(name, ())) for name in functions}
    progress = tqdm(total=len(functions) * (compile_repeats + repeats), unit="run")
    compiled: dict[_Name, Any] = {}
    temp_bytes: dict[_Name, int] = {}
    compile_seconds = {name: [] for name in functions}
    for _ in range(compile_repeats):
        executables = {}
        for name, fn in functions.items():
            progress.update()
            if name in on_host:
                compiled[name], temp_bytes[name] = fn, 0
                continue
            if compile_repeats > 1 if cold is None else cold:
                jax.clear_caches()
            start = time.perf_counter()
            if fn not in executables:
                executables[fn] = jax.jit(fn).lower(*arguments[name]).compile()
            compile_seconds[name].append(time.perf_counter() - start)
            compiled[name] = executables[fn]
            temp_bytes[name] = compiled[name].memory_analysis().temp_size_in_bytes

    def call(name):
        start = time.perf_counter()
        output = jax.block_until_ready(compiled[name](*arguments[name]))
        return output, time.perf_counter() - start

    first_calls = {name: call(name) for name in functions}
    # Those that take so long that a first call makes no difference are called once.
    seconds = {
        name: [seconds] if seconds > max_seconds else []
        for name, (_, seconds) in first_calls.items()
    }
    for _ in range(repeats):
        for name in functions:
            progress.update()
            past = seconds[name]
            enough = 1 if max(past, default=0) > max_seconds else _MIN_REPEATS
            if len(past) < enough or sum(past) <= max_seconds:
                past.append(call(name)[1])
    progress.close()
    return {
        name: Timing(
            float(np.median(compile_seconds[name] or 0)),
            np.array(seconds[name]),
            first_calls[name][0],
            temp_bytes[name],
        )
        for name in functions
    }


def print_environment() -> None:
    print(", ".join(f"{name} {version}" for name, version in environment().items()))


def environment() -> dict[str, str]:
    device = jax.devices()[0]
    packages = ("diffrax-deer", "diffrax", "equinox", "jax", "jaxlib")
    return {
        "device": f"{device.platform} ({device.device_kind})",
        **{name: importlib.metadata.version(name) for name in packages},
    }
