"""Classify sequences of 17,984 samples by events far apart, with a GRU.

Each sequence is noise in two channels, with two short bumps: the first one anywhere,
the second one at least a third of the sequence later, each of them in either channel.
The class is which channels, in order. So the GRU has to carry the first event past
thousands of samples, and its final state alone is classified. The task is a continuous
variant of the temporal order problem of Hochreiter and Schmidhuber, "Long short-term
memory", 1997. The length is that of the data set EigenWorms, and of the experiment of
Lim et al., "Parallelizing non-linear sequential models over the sequence length", ICLR
2024.

The GRU is trained with deer_scan, in parallel over the samples, and then once more with
jax.lax.scan, one sample after the other: from the same seed, and so with the same
losses. On a CPU the latter takes far less time, as there is little to be gained from
doing more work at once. The summary says what was measured.

An interrupted run can be continued with --resume. On a CPU it then ends with exactly
the same parameters as if it had never been interrupted. (On a GPU that takes
XLA_FLAGS=--xla_gpu_deterministic_ops=true.)

With --data, other sequences are classified:
- FILE.npz with an array `x` of shape (samples, length, channels), and an array `y` of
  shape (samples,) of integers, the classes;
- FILE.ts as in the UEA archive, for which aeon has to be installed (pip install aeon).
They are divided at random into 70% for training, and 15% each for validation and test.
"""

import dataclasses
import hashlib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _common import (
    argument_parser,
    batch_indices,
    Extras,
    History,
    plot_loss,
    print_summary,
    Result,
    save_leaves,
    save_plot,
    start_run,
    summarise,
    train,
    TrainingBatch,
    TrainingPreset,
    write_json,
)
from diffrax import RESULTS
from diffrax_deer import deer_scan, deer_scan_solution
from jaxtyping import Array, Float, Int, PRNGKeyArray
from tqdm import tqdm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset(TrainingPreset):
    hidden_size: int
    # Of the sequences that are made here.
    length: int
    bump_width: int


PRESETS = {
    "quick": Preset(
        hidden_size=8,
        length=2048,
        bump_width=32,
        num_train=256,
        num_val=128,
        num_test=128,
        batch_size=16,
        steps=320,
        learning_rate=2e-2,
        checkpoint_every=20,
        dtype="float64",
    ),
    "smoke": Preset(
        hidden_size=3,
        length=48,
        bump_width=6,
        num_train=16,
        num_val=8,
        num_test=8,
        batch_size=8,
        steps=100,
        learning_rate=2e-2,
        checkpoint_every=3,
        dtype="float64",
    ),
    "full": Preset(
        hidden_size=8,
        length=17_984,
        bump_width=256,
        num_train=512,
        num_val=128,
        num_test=128,
        batch_size=16,
        steps=600,
        learning_rate=2e-2,
        checkpoint_every=50,
        dtype="float32",
    ),
}


#
# The sequences
#


class Dataset(eqx.Module):
    xs: Float[Array, "samples length channels"]
    ys: Int[Array, " samples"]
    # The times of the events, if these are known.
    events: Int[Array, "samples 2"] | None


class Splits(eqx.Module):
    train: Dataset
    val: Dataset
    test: Dataset
    class_names: tuple[str, ...] = eqx.field(static=True)


def make_sequence(key, preset: Preset):
    class_key, gap_key, time_key, noise_key = jr.split(key, 4)
    y = jr.randint(class_key, (), 0, 4)
    channels = jnp.stack([y // 2, y % 2])
    room = preset.length - preset.bump_width
    gap = jr.uniform(gap_key, minval=1 / 3, maxval=1) * room
    first = jr.uniform(time_key) * (room - gap) + preset.bump_width / 2
    events = jnp.stack([first, first + gap])
    samples = jnp.arange(preset.length)[:, None]
    bumps = 3 * jnp.exp(-8 * ((samples - events) / preset.bump_width) ** 2)
    noise = jr.normal(noise_key, (preset.length, 2))
    x = bumps @ jax.nn.one_hot(channels, 2) + noise
    return x.astype(preset.dtype), y, events.astype(int)


def make_splits(key: PRNGKeyArray, preset: Preset) -> Splits:
    sizes = (preset.num_train, preset.num_val, preset.num_test)
    keys = jr.split(key, sum(sizes))
    make = eqx.filter_jit(jax.vmap(lambda key: make_sequence(key, preset)))
    train, val, test = (
        Dataset(*make(part)) for part in jnp.split(keys, np.cumsum(sizes)[:-1])
    )
    return Splits(train, val, test, class_names=("AA", "AB", "BA", "BB"))


#
# Sequences of the user
#


def read_data(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The sequences `(samples, length, channels)`, and their labels."""
    readers: dict[str, Callable] = {".npz": _read_npz, ".ts": _read_ts}
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
    return x, y


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


def split_data(
    key: PRNGKeyArray, preset: Preset, x: np.ndarray, y: np.ndarray
) -> Splits:
    classes, labels = np.unique(y, return_inverse=True)
    order = np.asarray(jr.permutation(key, len(y)))
    parts = np.split(order, np.cumsum([preset.num_train, preset.num_val]))
    # Only the training samples may be looked at.
    training = x[parts[0]].astype(preset.dtype)
    mean, std = training.mean((0, 1)), training.std((0, 1))
    x = (x.astype(preset.dtype) - mean) / np.where(std > 0, std, 1)
    train, val, test = (
        Dataset(jnp.asarray(x[part]), jnp.asarray(labels[part]), events=None)
        for part in parts
    )
    return Splits(train, val, test, class_names=tuple(str(name) for name in classes))


def fit_preset(preset: Preset, x: np.ndarray) -> Preset:
    held_out = max(1, round(0.15 * len(x)))
    num_train = len(x) - 2 * held_out
    return dataclasses.replace(
        preset,
        length=x.shape[1],
        num_train=num_train,
        num_val=held_out,
        num_test=held_out,
        batch_size=min(preset.batch_size, num_train),
    )


#
# The classifier
#


class Classifier(eqx.Module):
    cell: eqx.nn.GRUCell
    readout: eqx.nn.Linear

    def __init__(self, preset: Preset, channels: int, num_classes: int, key):
        cell_key, memory_key, readout_key = jr.split(key, 3)
        size, dtype = preset.hidden_size, jnp.dtype(preset.dtype)
        cell = eqx.nn.GRUCell(channels, size, dtype=dtype, key=cell_key)
        # Without this, everything is forgotten within a few samples, and so are the
        # gradients. With the update gate at sigmoid(log(time)), a number is remembered
        # for this time: here for anything up to the length of the sequences. (Tallec
        # and Ollivier, "Can recurrent neural networks warp time?", ICLR 2018.)
        times = jr.uniform(memory_key, (size,), dtype, minval=1, maxval=preset.length)
        self.cell = eqx.tree_at(
            lambda cell: cell.bias,
            cell,
            replace_fn=lambda bias: bias.at[size : 2 * size].set(jnp.log(times)),
        )
        self.readout = eqx.nn.Linear(size, num_classes, dtype=dtype, key=readout_key)

    @property
    def initial_state(self) -> Float[Array, " hidden"]:
        return jnp.zeros(self.cell.hidden_size, self.cell.weight_hh.dtype)


# From a guess of all states, if there is one, to the final state.
Scan = Callable[
    [Classifier, Float[Array, "length channels"], Float[Array, "length hidden"] | None],
    tuple[Float[Array, " hidden"], Extras],
]


def parallel_scan(classifier, x, guess):
    # `deer_scan` is the same, but returns neither all states nor the number of
    # iterations.
    solution = deer_scan_solution(
        lambda hidden, x: (classifier.cell(x, hidden), None),
        classifier.initial_state,
        x,
        guess=guess.astype(x.dtype),
    )
    failed = solution.result != RESULTS.successful
    hidden = solution.result.error_if(solution.carry, failed)
    next_guess = solution.carries.astype(guess.dtype)
    return hidden, Extras(solution.num_iterations, next_guess)


def sequential_scan(classifier, x, guess=None):
    del guess
    hidden, _ = lax.scan(
        lambda hidden, x: (classifier.cell(x, hidden), None),
        classifier.initial_state,
        x,
    )
    return hidden, Extras()


SCANS: dict[str, Scan] = {"deer_scan": parallel_scan, "lax.scan": sequential_scan}


@eqx.filter_jit
def probabilities(
    classifier: Classifier, x: Float[Array, "length channels"]
) -> Float[Array, "length classes"]:
    """Of the classes, if the sequence ended after each sample."""

    def f(hidden, x):
        hidden = classifier.cell(x, hidden)
        return hidden, jax.nn.softmax(classifier.readout(hidden))

    _, out = deer_scan(f, classifier.initial_state, x)
    return out


def cross_entropy(logits, ys):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, ys))


#
# Training
#


class Batch(TrainingBatch):
    xs: Float[Array, "batch length channels"]
    ys: Int[Array, " batch"]


class Experiment(eqx.Module):
    """What both kinds of scan start from."""

    data: Splits
    classifier: Classifier
    batch_key: PRNGKeyArray

    def __init__(
        self, preset: Preset, seed: int, data: tuple[np.ndarray, np.ndarray] | None
    ):
        data_key, model_key, self.batch_key = jr.split(jr.key(seed), 3)
        if data is None:
            self.data = make_splits(data_key, preset)
        else:
            self.data = split_data(data_key, preset, *data)
        channels = self.data.train.xs.shape[-1]
        num_classes = len(self.data.class_names)
        self.classifier = Classifier(preset, channels, num_classes, key=model_key)


def train_with(
    name: str, scan: Scan, preset: Preset, experiment: Experiment, path: Path
) -> tuple[Classifier, History]:
    schedule = optax.cosine_decay_schedule(
        preset.learning_rate, preset.steps, alpha=0.05
    )
    # Where a gate begins to open for the events, gradients become large for a while.
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss_fn(classifier, batch, guess):
        hidden, extras = jax.vmap(scan, in_axes=(None, 0, 0))(
            classifier, batch.xs, guess
        )
        loss = cross_entropy(jax.vmap(classifier.readout)(hidden), batch.ys)
        return loss, extras

    def make_batch(step):
        indices = batch_indices(
            experiment.batch_key, step, preset.num_train, preset.batch_size
        )
        data = experiment.data.train
        return Batch(indices, data.xs[indices], data.ys[indices])

    if scan is parallel_scan:
        # Once the gates have learnt to open and close, it takes dozens of iterations
        # from a constant first guess, but only about five from the states at the
        # previous visit. These do not have to be precise.
        shape = (preset.num_train, preset.length, preset.hidden_size)
        guesses = np.zeros(shape, np.float16)
    else:
        guesses = None
    return train(
        name,
        loss_fn,
        optimiser,
        experiment.classifier,
        make_batch,
        preset,
        path,
        guesses=guesses,
    )


#
# Results
#


@eqx.filter_jit
def evaluate(
    classifier: Classifier, data: Dataset
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The cross-entropy, and the fraction of the sequences that are classified
    correctly.
    """
    # One after the other, as there is no good guess for a sequence never seen before.
    hidden, _ = jax.vmap(sequential_scan, in_axes=(None, 0))(classifier, data.xs)
    logits = jax.vmap(classifier.readout)(hidden)
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == data.ys)
    return cross_entropy(logits, data.ys), accuracy


def run_scan(
    name: str, scan: Scan, preset: Preset, experiment: Experiment, output: Path
) -> Result:
    metrics: dict[str, float] = {}

    def measure(label, classifier, data):
        loss, accuracy = evaluate(classifier, data)
        metrics[f"{label}_loss"] = float(loss)
        metrics[f"{label}_accuracy"] = float(accuracy)
        return f"{accuracy:.1%}"

    val, test = experiment.data.val, experiment.data.test
    untrained = measure("untrained_validation", experiment.classifier, val)
    tqdm.write(f"{name}: validation accuracy {untrained} before training")
    path = output / f"checkpoint_{name}.eqx"
    classifier, history = train_with(name, scan, preset, experiment, path)
    trained = measure("validation", classifier, val)
    measure("test", classifier, test)
    tqdm.write(f"{name}: validation accuracy {trained} after training")
    save_leaves(output / f"model_{name}.eqx", classifier)
    return Result(classifier, history, metrics)


def print_speed(summary: dict[str, Any]) -> None:
    deer, sequential = (
        summary["solvers"][name]["median_step_seconds"] for name in SCANS
    )
    print(
        f"With deer_scan, a training step took {deer / sequential:.2g} times as long "
        "as with jax.lax.scan."
    )


def plot_sequences(path: Path, classifier: Classifier, data: Splits) -> None:
    """One sequence of each class, and what the classifier makes of it."""
    test, names = data.test, data.class_names
    _, indices = np.unique(test.ys, return_index=True)
    indices = indices[:4]
    num_channels = min(test.xs.shape[-1], 6)
    # The channels are standardised, so this separates them.
    offsets = -9 * np.arange(num_channels)

    def draw(*axes):
        columns = zip(indices, axes[: len(indices)], axes[len(indices) :])
        for index, sequence_axes, probability_axes in columns:
            x, name = test.xs[index], names[test.ys[index]]
            sequence_axes.plot(x[:, :num_channels] + offsets, lw=0.4)
            sequence_axes.set(title=f"A held-out sequence of class {name}")
            for out, label in zip(probabilities(classifier, x).T[:6], names):
                width = 2.5 if label == name else 1.2
                probability_axes.plot(out, lw=width, label=f"class {label}")
            probability_axes.set(xlabel="sample", ylim=(-0.03, 1.03))
            if test.events is not None:
                for either_axes in (sequence_axes, probability_axes):
                    for event, label in zip(test.events[index], ["events", None]):
                        either_axes.axvline(
                            event, color="black", lw=0.8, ls=":", label=label
                        )
            labels = [chr(ord("A") + channel) for channel in range(num_channels)]
            sequence_axes.set_yticks(offsets, labels)
        axes[0].set(ylabel="channel")
        axes[len(indices)].set(
            ylabel="probability of each class so far\n(thick: the true one)"
        )
        handles, labels = axes[-1].get_legend_handles_labels()
        axes[-1].figure.legend(handles, labels, loc="outside lower center", ncols=7)

    save_plot(path, draw, size=(4 * len(indices), 6.5), columns=len(indices), rows=2)


def main(argv: Sequence[str] | None = None) -> None:
    presets = dict(
        quick="has shorter sequences, and ends within minutes on a CPU",
        smoke="only shows that everything works",
        full="has 17,984 samples, for a GPU",
    )
    parser = argument_parser(
        __doc__ or "", presets, list(SCANS), "output/gru_long_sequence"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="classify these sequences, .npz or .ts (default: sequences made here)",
    )
    args = parser.parse_args(argv)

    preset = PRESETS[args.preset]
    data = digest = None
    if args.data is not None:
        data = read_data(args.data)
        digest = hashlib.sha256(args.data.read_bytes()).hexdigest()
        preset = fit_preset(preset, data[0])
    if args.steps is not None:
        preset = dataclasses.replace(preset, steps=args.steps)
    jax.config.update("jax_enable_x64", preset.dtype == "float64")
    settings = dict(
        preset=args.preset,
        seed=args.seed,
        data_sha256=digest,
        **dataclasses.asdict(preset),
    )
    start_run(args.output, settings, args.resume)

    experiment = Experiment(preset, args.seed, data)
    results = {
        name: run_scan(name, scan, preset, experiment, args.output)
        for name, scan in SCANS.items()
        if args.solver in ("both", name)
    }
    summary = summarise(results, settings)
    write_json(args.output / "summary.json", summary)
    print_summary(
        summary,
        {
            "validation loss, untrained": ("untrained_validation_loss", "{:.2e}"),
            "validation loss": ("validation_loss", "{:.2e}"),
            "test loss": ("test_loss", "{:.2e}"),
            "validation accuracy, untrained": (
                "untrained_validation_accuracy",
                "{:.1%}",
            ),
            "validation accuracy": ("validation_accuracy", "{:.1%}"),
            "test accuracy": ("test_accuracy", "{:.1%}"),
        },
    )
    if len(results) == len(SCANS):
        print_speed(summary)

    plot_loss(
        args.output / "loss.png",
        preset,
        results,
        colours={"deer_scan": "C0", "lax.scan": "C1"},
        title="Training loss of batches and epochs",
        ylabel="cross-entropy",
    )
    classifier = next(iter(results.values())).model
    plot_sequences(args.output / "sequences.png", classifier, experiment.data)
    print(f"Plots: {args.output}/{{loss,sequences}}.png")


if __name__ == "__main__":
    main()
