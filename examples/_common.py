"""What the examples share: batches, checkpoints, command line and plots."""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import equinox as eqx
import jax
import jax.random as jr
import matplotlib
from jaxtyping import Array, Int, PRNGKeyArray, PyTree
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def batch_indices(
    key: PRNGKeyArray, step: int, dataset_size: int, batch_size: int
) -> Int[Array, " batch_size"]:
    """The indices of the training examples of one step. Every epoch visits each once.

    As this is a pure function, a training run can be continued from any step.
    """
    epoch, position = divmod(step, dataset_size // batch_size)
    permutation = jr.permutation(jr.fold_in(key, epoch), dataset_size)
    return permutation[position * batch_size : (position + 1) * batch_size]


def atomic_write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """At any moment, `path` is either its old or its new content, and complete."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_leaves(path: Path, tree: PyTree) -> None:
    atomic_write(path, lambda file: eqx.tree_serialise_leaves(file, tree))


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))


def start_run(output: Path, settings: dict[str, Any], resume: bool) -> None:
    """Either forgets what `output` holds of an earlier run, or makes sure that this can
    be continued with the same settings.
    """
    if output.exists() and not output.is_dir():
        raise SystemExit(f"error: the output folder {output} is a file.")
    path = output / "settings.json"
    if not resume:
        output.mkdir(parents=True, exist_ok=True)
        for checkpoint in output.glob("checkpoint_*.eqx"):
            checkpoint.unlink()
        write_json(path, settings)
        return
    if not path.exists():
        raise SystemExit(f"error: there is no run to resume in {output}.")
    saved = json.loads(path.read_text())
    settings = json.loads(json.dumps(settings))  # tuples become lists
    changed = [
        f"{name} = {settings.get(name)} (was {saved.get(name)})"
        for name in sorted(settings.keys() | saved.keys())
        if settings.get(name) != saved.get(name)
    ]
    if len(changed) > 0:
        raise SystemExit(
            f"error: the run in {output} cannot be resumed with other settings: "
            + ", ".join(changed)
        )


def positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def argument_parser(
    description: str, presets: dict[str, str], solvers: Sequence[str], output: str
) -> argparse.ArgumentParser:
    """**Arguments:**

    - `presets`: what each preset is for. The first one is the default.
    - `solvers`: the names of what is trained one after the other.
    - `output`: the default output folder.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset",
        choices=presets,
        default=next(iter(presets)),
        help="sizes of the experiment: "
        + "; ".join(f"'{name}' {text}" for name, text in presets.items())
        + " (default: %(default)s)",
    )
    parser.add_argument(
        "--solver",
        choices=["both", *solvers],
        default="both",
        help="train with this solver only (default: with one after the other)",
    )
    parser.add_argument(
        "--steps",
        type=positive_int,
        metavar="N",
        help="number of training steps with each solver (default: by preset)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the data, the initial parameters and the batches (default: 0)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(output),
        metavar="DIR",
        help="folder for checkpoints, models, plots and summary (default: %(default)s)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in the output folder from its last checkpoints. It must "
        "have the same preset, seed and number of steps. (Without this option its "
        "checkpoints are deleted, and training begins anew.)",
    )
    return parser


_STYLE: Any = {
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def save_plot(
    path: Path, draw: Callable[..., None], size: tuple[float, float], columns: int = 1
) -> None:
    """`draw` is called with one set of axes for each column."""
    # Neither needs nor opens a display, unlike `pyplot`.
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size)
        axes: list[Axes] = list(figure.subplots(1, columns, squeeze=False)[0])
        draw(*axes)
        atomic_write(path, lambda file: figure.savefig(file, format="png"))


def device_description() -> str:
    device = jax.devices()[0]
    return f"{device.platform} ({device.device_kind})"
