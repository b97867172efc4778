"""What the examples share: training, checkpoints, command line, results and plots."""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Generic, Literal, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm


_Batch = TypeVar("_Batch", bound="TrainingBatch")
_Model = TypeVar("_Model", bound=eqx.Module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPreset:
    num_train: int
    num_val: int
    num_test: int
    batch_size: int
    steps: int
    learning_rate: float
    checkpoint_every: int
    # In double precision, rounding errors stay small enough throughout training that
    # the losses with both solvers agree. In single precision they grow apart.
    dtype: Literal["float32", "float64"]


#
# Files
#


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


#
# Training
#


class TrainingBatch(eqx.Module):
    indices: Int[Array, " batch"]


class Extras(NamedTuple):
    """What comes out of the solver besides the solution. Each has a leading axis for
    the members of the batch.
    """

    iterations: Int[Array, " batch"] | None = None
    # What it may start from the next time.
    guess: Array | None = None


class Learner(eqx.Module, Generic[_Model]):
    """What a training step changes."""

    model: _Model
    opt_state: optax.OptState


class History(eqx.Module):
    """What every training step was like."""

    loss: np.ndarray
    seconds: np.ndarray
    # For each member of the batch. Only with DEER.
    iterations: np.ndarray
    compile_seconds: np.ndarray


class Checkpoint(eqx.Module, Generic[_Model]):
    """As each batch is a pure function of the seed and the step, `step` is the position
    of the random number generator, too.
    """

    learner: Learner[_Model]
    step: int
    history: History
    guesses: np.ndarray | None


def _initial_checkpoint(
    model: _Model,
    optimiser: optax.GradientTransformation,
    preset: TrainingPreset,
    guesses: np.ndarray | None,
) -> Checkpoint[_Model]:
    opt_state = optimiser.init(eqx.filter(model, eqx.is_array))
    history = History(
        loss=np.zeros(preset.steps),
        seconds=np.zeros(preset.steps),
        iterations=np.zeros((preset.steps, preset.batch_size), int),
        compile_seconds=np.zeros(()),
    )
    return Checkpoint(Learner(model, opt_state), 0, history, guesses)


def _make_train_step(loss_fn, optimiser):
    def train_step(learner, batch, guess):
        (loss, extras), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(
            learner.model, batch, guess
        )
        updates, opt_state = optimiser.update(grads, learner.opt_state)
        model = eqx.apply_updates(learner.model, updates)
        return Learner(model, opt_state), loss, extras

    return train_step


def train(
    name: str,
    loss_fn: Callable[[_Model, _Batch, Array | None], tuple[Float[Array, ""], Extras]],
    optimiser: optax.GradientTransformation,
    model: _Model,
    make_batch: Callable[[int], _Batch],
    preset: TrainingPreset,
    path: Path,
    guesses: np.ndarray | None = None,
    describe: Callable[[_Batch], str] | None = None,
) -> tuple[_Model, History]:
    """**Arguments:**

    - `name`: stands before the progress bar.
    - `loss_fn`: of the model, a batch, and its part of `guesses`.
    - `model`: the untrained model.
    - `make_batch`: a pure function of the number of the training step.
    - `path`: the checkpoint. If it exists then training is continued from there.
    - `guesses`: for each training example, what the solver starts from the first time.
        Every time an example is visited, what the solver returns takes its place.
    - `describe`: what to show of a batch in the progress bar.
    """
    checkpoint = _initial_checkpoint(model, optimiser, preset, guesses)
    if path.exists():
        checkpoint = eqx.tree_deserialise_leaves(path, checkpoint)
    learner, history = checkpoint.learner, checkpoint.history
    guesses = checkpoint.guesses
    if checkpoint.step == preset.steps:
        return learner.model, history

    def guess_for(batch):
        return None if guesses is None else jnp.asarray(guesses[batch.indices])

    batch = make_batch(checkpoint.step)
    guess = guess_for(batch)
    start = time.perf_counter()
    train_step = eqx.filter_jit(_make_train_step(loss_fn, optimiser))
    # All batches are alike, so this happens only once.
    train_step = train_step.lower(learner, batch, guess).compile()  # pyright: ignore
    history.compile_seconds[()] += time.perf_counter() - start

    bar = tqdm(desc=name, initial=checkpoint.step, total=preset.steps, unit="step")
    for step in range(checkpoint.step, preset.steps):
        batch = make_batch(step)
        start = time.perf_counter()
        learner, *outputs = train_step(learner, batch, guess_for(batch))
        loss, (iterations, next_guess) = jax.device_get(outputs)
        if guesses is not None:
            guesses[batch.indices] = next_guess
        history.seconds[step] = time.perf_counter() - start
        history.loss[step] = loss
        if iterations is not None:
            history.iterations[step] = iterations

        done = step + 1
        if done % preset.checkpoint_every == 0 or done == preset.steps:
            save_leaves(path, Checkpoint(learner, done, history, guesses))
        text = f"loss {loss:.2e}"
        if describe is not None:
            text += f", {describe(batch)}"
        if iterations is not None:
            text += f", {np.mean(iterations):.1f} iterations"
        bar.set_postfix_str(text, refresh=False)
        bar.update()
    bar.close()
    return learner.model, history


def batch_indices(
    key: PRNGKeyArray, step: int, dataset_size: int, batch_size: int
) -> Int[Array, " batch_size"]:
    """The indices of the training examples of one step. Every epoch visits each once.

    As this is a pure function, a training run can be continued from any step.
    """
    epoch, position = divmod(step, dataset_size // batch_size)
    permutation = jr.permutation(jr.fold_in(key, epoch), dataset_size)
    return permutation[position * batch_size : (position + 1) * batch_size]


#
# Command line
#


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


#
# Results
#


class Result(NamedTuple):
    model: Any
    history: History
    # Of the model, before and after training.
    metrics: dict[str, float]


def loss_difference(results: dict[str, Result]) -> np.ndarray:
    """The relative difference of the losses in every step."""
    deer, sequential = (result.history.loss for result in results.values())
    return np.abs(deer - sequential) / sequential


def summarise(
    results: dict[str, Result], settings: dict[str, Any], packages: Sequence[str] = ()
) -> dict[str, Any]:
    solvers: dict[str, dict[str, Any]] = {}
    for name, (_, history, metrics) in results.items():
        solvers[name] = dict(
            **metrics,
            training_loss=history.loss.tolist(),
            compile_seconds=float(history.compile_seconds),
            training_seconds=float(np.sum(history.seconds)),
            median_step_seconds=float(np.median(history.seconds)),
        )
        if np.any(history.iterations > 0):
            solvers[name]["mean_iterations"] = float(np.mean(history.iterations))
    packages = ["diffrax-deer", "equinox", "jax", "jaxlib", "optax", *packages]
    return dict(
        settings=settings,
        solvers=solvers,
        max_relative_loss_difference=float(np.max(loss_difference(results)))
        if len(results) == 2
        else None,
        device=device_description(),
        versions={name: importlib.metadata.version(name) for name in sorted(packages)},
    )


def print_summary(summary: dict[str, Any], metrics: dict[str, tuple[str, str]]) -> None:
    """**Arguments:**

    - `summary`: from `summarise`.
    - `metrics`: for each row, which of the metrics it shows, and in what format.
    """
    rows = {
        "compilation": ("compile_seconds", "{:.1f} s"),
        "training, without compilation": ("training_seconds", "{:.1f} s"),
        "median training step": ("median_step_seconds", "{:.2g} s"),
        **metrics,
    }
    solvers = summary["solvers"]
    print(f"\n{summary['device']:30}" + "".join(f"{name:>12}" for name in solvers))
    for label, (key, form) in rows.items():
        values = (form.format(solver[key]) for solver in solvers.values())
        print(f"{label:30}" + "".join(f"{value:>12}" for value in values))
    for solver in solvers.values():
        if "mean_iterations" in solver:
            print(f"{'iterations':30}{solver['mean_iterations']:>12.2f}")
    difference = summary["max_relative_loss_difference"]
    if difference is not None:
        print(
            f"\nThe two loss curves agree to a relative difference of {difference:.1e}."
        )


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
    path: Path,
    draw: Callable[..., None],
    size: tuple[float, float],
    columns: int = 1,
    rows: int = 1,
) -> None:
    """`draw` is called with one set of axes for each column, row after row."""
    # Neither needs nor opens a display, unlike `pyplot`.
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size)
        axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
        draw(*axes)
        atomic_write(path, lambda file: figure.savefig(file, format="png"))


def plot_loss(
    path: Path,
    preset: TrainingPreset,
    results: dict[str, Result],
    colours: dict[str, str],
    title: str,
    ylabel: str,
) -> None:
    epoch = preset.num_train // preset.batch_size
    num_epochs = preset.steps // epoch

    def draw(time_axes, difference_axes=None):
        for name, result in results.items():
            history = result.history
            seconds, loss = np.cumsum(history.seconds), history.loss
            epoch_ends = epoch * np.arange(1, num_epochs + 1) - 1
            epoch_loss = loss[: epoch * num_epochs].reshape(num_epochs, epoch).mean(1)
            colour = colours[name]
            label = f"{name} (after {history.compile_seconds:.0f} s of compilation)"
            time_axes.semilogy(seconds, loss, color=colour, lw=0.8, alpha=0.25)
            time_axes.semilogy(
                seconds[epoch_ends], epoch_loss, color=colour, lw=1.8, label=label
            )
        time_axes.set(
            title=title,
            xlabel="wall-clock time, without compilation (s)",
            ylabel=ylabel,
        )
        time_axes.legend()
        if difference_axes is not None:
            steps = np.arange(1, preset.steps + 1)
            # The logarithmic scale has no place for zero.
            difference = np.maximum(loss_difference(results), 1e-17)
            difference_axes.semilogy(steps, difference, "k.", ms=3)
            difference_axes.set(
                title=f"Difference between {' and '.join(results)}",
                xlabel="training step",
                ylabel="relative difference of the losses",
            )

    columns = len(results)
    save_plot(path, draw, size=(5.5 * columns, 4.2), columns=columns)


def device_description() -> str:
    device = jax.devices()[0]
    return f"{device.platform} ({device.device_kind})"
