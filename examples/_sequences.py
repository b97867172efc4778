"""The sequences that the GRU classifies: made here, or of the user."""

import dataclasses
import hashlib
import zipfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray


class Dataset(eqx.Module):
    index: Int[Array, " samples"]
    xs: Float[Array, "samples length channels"]
    ys: Int[Array, " samples"]


@dataclasses.dataclass(frozen=True)
class Sequences:
    # Of shape `(samples, length, channels)`, and their labels.
    x: np.ndarray
    y: np.ndarray
    # Of the file that they are from.
    sha256: str | None = None

    def split(self, key: PRNGKeyArray, num_train: int, dtype: Any) -> list[Dataset]:
        """Into what is for training and what is for the test."""
        _, y = np.unique(self.y, return_inverse=True)
        parts = np.split(np.asarray(jr.permutation(key, len(y))), [num_train])
        # Standardised by what may be looked at.
        seen = self.x[parts[0]].astype(float)
        mean, std = seen.mean((0, 1)), seen.std((0, 1))
        x = ((self.x - mean) / np.where(std > 0, std, 1)).astype(dtype)
        return [
            Dataset(jnp.arange(len(part)), jnp.asarray(x[part]), jnp.asarray(y[part]))
            for part in parts
        ]


def load(path: Path | None, preset: Any, key: PRNGKeyArray) -> tuple[Any, Sequences]:
    """Also returns the preset, with the sizes of what is read, if it is."""
    if path is None:
        return preset, make_data(preset, key)
    data = read_data(path)
    num_test = max(1, round(0.15 * len(data.x)))
    num_train = len(data.x) - num_test
    preset = dataclasses.replace(
        preset,
        length=data.x.shape[1],
        num_train=num_train,
        num_test=num_test,
        batch_size=min(preset.batch_size, num_train),
    )
    return preset, data


def make_data(preset: Any, key: PRNGKeyArray) -> Sequences:
    """Noise in two channels, with two short bumps: the first one anywhere, the second
    one at least a third of the sequence later, each of them in either channel. The
    class is which channels, in order.
    """
    length, bump_width = preset.length, preset.bump_width

    def make_sequence(key):
        class_key, gap_key, time_key, noise_key = jr.split(key, 4)
        y = jr.randint(class_key, (), 0, 4)
        channels = jax.nn.one_hot(jnp.stack([y // 2, y % 2]), 2)
        room = length - bump_width
        gap = jr.uniform(gap_key, minval=1 / 3, maxval=1) * room
        first = jr.uniform(time_key) * (room - gap) + bump_width / 2
        distances = jnp.arange(length)[:, None] - jnp.stack([first, first + gap])
        bumps = 3 * jnp.exp(-8 * (distances / bump_width) ** 2)
        return bumps @ channels + jr.normal(noise_key, (length, 2)), y

    keys = jr.split(key, preset.num_train + preset.num_test)
    x, y = jax.jit(jax.vmap(make_sequence))(keys)
    return Sequences(np.asarray(x), np.asarray(y))


def read_data(path: Path) -> Sequences:
    readers = {".npz": _read_npz, ".ts": _read_ts}
    if path.suffix not in readers:
        raise SystemExit(f"error: --data takes a file .npz or .ts, not {path}.")
    if not path.is_file():
        raise SystemExit(f"error: there is no file {path}.")
    x, y = readers[path.suffix](path)
    if x.ndim != 3 or x.dtype.kind not in "fiu":
        raise SystemExit(
            f"error: `x` in {path} must be numbers of shape (samples, length, "
            f"channels), but has shape {x.shape} and type {x.dtype}."
        )
    if y.shape != x.shape[:1]:
        raise SystemExit(
            f"error: `y` in {path} must have shape {x.shape[:1]}, one label for each "
            f"sample of `x`, but has shape {y.shape}."
        )
    if not np.all(np.isfinite(x)):
        raise SystemExit(f"error: `x` in {path} has values that are not finite.")
    if min(x.shape) == 0 or len(y) < 8 or len(np.unique(y)) < 2:
        raise SystemExit(
            f"error: {path} has to have at least 8 samples, which are not empty, of at "
            f"least 2 classes, but `x` has shape {x.shape}, and the classes are "
            f"{np.unique(y).tolist()}."
        )
    return Sequences(x, y, hashlib.sha256(path.read_bytes()).hexdigest())


def _read_npz(path):
    try:
        # Nothing in the file is executed.
        file = np.load(path, allow_pickle=False)
        arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as e:
        raise SystemExit(f"error: {path} is not a file of arrays: {e}") from None
    for name, what in (
        ("x", "the sequences, of shape (samples, length, channels)"),
        ("y", "the integer labels, of shape (samples,)"),
    ):
        if name not in arrays:
            raise SystemExit(
                f"error: {path} has no array `{name}` ({what}). "
                f"It has: {', '.join(arrays) or 'nothing'}."
            )
    x, y = arrays["x"], arrays["y"]
    if y.dtype.kind not in "iu":
        raise SystemExit(f"error: `y` in {path} must be integers, but is {y.dtype}.")
    return x, y


def _read_ts(path):
    try:
        from aeon.datasets import (  # pyright: ignore[reportMissingImports]
            load_from_ts_file,
        )
    except ImportError as e:
        raise SystemExit(
            "error: to read .ts files, aeon has to be installed: pip install aeon "
            f"({e})"
        ) from None
    try:
        x, y = load_from_ts_file(str(path))
    except (OSError, ValueError) as e:
        raise SystemExit(f"error: {path} cannot be read: {e}") from None
    if isinstance(x, list):
        raise SystemExit(f"error: the sequences in {path} differ in length.")
    # That of a regression problem has numbers for labels.
    if x.ndim != 3 or y.dtype.kind == "f":
        raise SystemExit(f"error: {path} has no sequences with class labels.")
    return np.swapaxes(x, 1, 2), y
