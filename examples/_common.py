"""What the examples share: command line, training, checkpoints, results and plots."""

import abc
import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import optax
from diffrax_deer import DeerAdjoint, DeerSolver
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm


class Preset(eqx.Module):
    _: dataclasses.KW_ONLY
    num_train: int
    num_test: int
    batch_size: int
    steps: int
    learning_rate: float = 2e-2
    # In double precision, rounding errors stay small enough throughout training that
    # the losses with all solvers agree. In single precision they grow apart.
    dtype: Literal["float32", "float64"] = "float64"


# Keyword arguments of any types.
Options = dict[str, Any]


class Extras(NamedTuple):
    """What there is besides the loss."""

    # Of the solver, for each member of the batch.
    iterations: Int[Array, " batch"] | None = None
    # What the next training step is handed.
    memory: PyTree[Array] = None


class Task(eqx.Module):
    """What is learnt, and from what. All solvers start from the same."""

    preset: eqx.AbstractVar[Preset]
    # Untrained.
    model: eqx.AbstractVar[eqx.Module]

    @abc.abstractmethod
    def batch(self, step: int) -> PyTree[Array]:
        """A pure function, so that training can be continued from any step."""

    @abc.abstractmethod
    def loss(self, model, batch, solver, memory) -> tuple[Float[Array, ""], Extras]:
        """With any of the solvers."""

    @abc.abstractmethod
    def evaluate(self, model) -> dict[str, Float[Array, ""]]:
        """How good a model is, on data that it has not been trained on."""

    @abc.abstractmethod
    def plot(self, model, folder: Path) -> None:
        """What has been learnt."""

    def memory(self, solver) -> PyTree[Array]:
        """What the first training step is handed."""
        del solver
        return None


class Way(NamedTuple):
    """A way to solve a differential equation."""

    solver: dfx.AbstractSolver
    adjoint: dfx.AbstractAdjoint
    # Of devices, if there are several.
    mesh: Mesh | None = None


def ways(solver: dfx.AbstractSolver) -> dict[str, Way]:
    """To make the same steps: sequentially, with either adjoint, and jointly."""
    name = type(solver).__name__
    return {
        name: Way(solver, dfx.RecursiveCheckpointAdjoint()),
        f"{name}+DeerAdjoint": Way(solver, DeerAdjoint()),
        "DEER": Way(DeerSolver(solver, substeps=1), DeerAdjoint()),
    }


def over_devices(solver: dfx.AbstractSolver, steps: int, mesh: Mesh) -> dict[str, Way]:
    """Jointly, all steps in one window, of which each device has a part."""
    sharding = NamedSharding(mesh, PartitionSpec("time"))
    solver = DeerSolver(solver, steps, sharding=sharding)
    return {"DEER": Way(solver, DeerAdjoint(), mesh)}


def batch_of(
    examples: PyTree[Array], key: PRNGKeyArray, step: int, preset: Preset
) -> PyTree[Array]:
    """The training examples of a step. Every epoch visits each of them once."""
    size = preset.batch_size
    epoch, position = divmod(step, preset.num_train // size)
    permutation = jr.permutation(jr.fold_in(key, epoch), preset.num_train)
    indices = permutation[position * size : (position + 1) * size]
    return jax.tree.map(lambda x: x[indices], examples)


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


#
# Training
#


class History(eqx.Module):
    """What every training step was like."""

    losses: np.ndarray
    seconds: np.ndarray
    # In the mean over the batch. Only with DEER.
    iterations: np.ndarray
    compile_seconds: np.ndarray


class Checkpoint(eqx.Module):
    """As each batch is a pure function of the seed and the step, `step` is the position
    of the random number generator, too.
    """

    model: eqx.Module
    opt_state: optax.OptState
    memory: PyTree[Array]
    step: int
    history: History


def train(name: str, task: Task, solver: Any, path: Path) -> tuple[Any, History]:
    """Continues from the checkpoint, if there is one."""
    preset = task.preset
    schedule = optax.cosine_decay_schedule(
        preset.learning_rate, preset.steps, alpha=0.05
    )
    # Gradients may become large for a while.
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    mesh = getattr(solver, "mesh", None)

    def divided(batch, mesh):
        sharding = NamedSharding(mesh, PartitionSpec("batch"))
        return [x if x.ndim == 0 else eqx.filter_shard(x, sharding) for x in batch]

    def train_step(model, opt_state, memory, batch):
        batch = batch if mesh is None else divided(batch, mesh)

        def loss_fn(model):
            return task.loss(model, batch, solver, memory)

        (loss, extras), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model)
        updates, opt_state = optimiser.update(grads, opt_state)
        iterations = extras.iterations
        mean = jnp.nan if iterations is None else jnp.mean(iterations)
        learner = eqx.apply_updates(model, updates), opt_state, extras.memory
        out = learner, loss, mean
        if mesh is not None:
            # All devices have all of this.
            out = eqx.filter_shard(out, NamedSharding(mesh, PartitionSpec()))
        return out

    opt_state = optimiser.init(eqx.filter(task.model, eqx.is_array))
    log = np.zeros(preset.steps)
    history = History(log, log.copy(), log.copy(), np.zeros(()))
    state = Checkpoint(task.model, opt_state, task.memory(solver), 0, history)
    if path.exists():
        state = eqx.tree_deserialise_leaves(path, state)
    learner = state.model, state.opt_state, state.memory
    first, history = state.step, state.history
    if first == preset.steps:
        return state.model, history

    checkpoint_every = min(100, math.ceil(preset.steps / 10))
    start = time.perf_counter()
    # All batches are alike, so this happens only once.
    jitted: Any = eqx.filter_jit(train_step)
    compiled = jitted.lower(*learner, task.batch(first)).compile()
    history.compile_seconds[()] += time.perf_counter() - start

    # Nothing is shown where there is no terminal.
    bar = tqdm(desc=name, initial=first, total=preset.steps, disable=None)
    for step in range(first, preset.steps):
        batch = task.batch(step)
        start = time.perf_counter()
        learner, loss, iterations = jax.block_until_ready(compiled(*learner, batch))
        history.seconds[step] = time.perf_counter() - start
        history.losses[step], history.iterations[step] = loss, iterations
        bar.set_postfix_str(f"loss {loss:.2e}", refresh=False)
        bar.update()
        done = step + 1
        if done % checkpoint_every == 0 or done == preset.steps:
            model, opt_state, memory = learner
            save_leaves(path, Checkpoint(model, opt_state, memory, done, history))
    bar.close()
    return learner[0], history


#
# A whole run
#


def positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def mesh_shape(text: str) -> tuple[int, ...]:
    shape = tuple(map(positive_int, text.split("x")))
    if len(shape) != 2:
        raise argparse.ArgumentTypeError(f"must be like 2x4, got {text!r}")
    return shape


def cli(
    description: str | None,
    presets: Mapping[str, Preset],
    solvers: Mapping[str, Any],
    several_devices: bool = False,
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--preset", choices=presets, default="quick", help="sizes (default: quick)")
    option(
        "--solver",
        choices=["all", *(name.lower() for name in solvers)],
        default="all",
        help="train with this one only (default: with one after the other)",
    )
    option("--steps", type=positive_int, help="of training (default: by preset)")
    option("--seed", type=int, default=0, help="of all that is random (default: 0)")
    option(
        "--output",
        type=Path,
        default=Path("output", Path(parser.prog).stem),
        help="folder for checkpoints, models, plots and summary (default: %(default)s)",
    )
    option(
        "--resume",
        action="store_true",
        help="continue the run in the output folder from its last checkpoints. It must "
        "have the same preset, seed and number of steps. (Without this option its "
        "checkpoints are deleted, and training begins anew.)",
    )
    parser.set_defaults(mesh=None, processes=None)
    if several_devices:
        option(
            "--mesh",
            type=mesh_shape,
            metavar="BATCHxTIME",
            help="train with DEER only, with the batch and the time axis divided over "
            "this many devices each, for example 2x4",
        )
        option(
            "--processes",
            nargs=3,
            metavar=("ADDRESS", "NUMBER", "INDEX"),
            help="this is one of several processes that have devices, and at this "
            "address (host:port) the first one of them, with index 0, is to be found",
        )
    return parser


def mesh_of(args: argparse.Namespace) -> Mesh | None:
    """What --mesh and --processes ask for. Must come before anything else that JAX
    does."""
    if args.processes is not None:
        address, number, index = args.processes
        jax.distributed.initialize(address, int(number), int(index))
        if int(index) > 0:
            # All have the same to say.
            args.output = args.output / f"process_{index}"
    if args.mesh is None:
        return None
    axis_types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(args.mesh, ("batch", "time"), axis_types=axis_types)


def run(
    make_task: Callable[[Any, PRNGKeyArray], Task],
    preset: Any,
    solvers: Mapping[str, Any],
    args: argparse.Namespace,
    **settings: Any,
) -> None:
    """Trains with one solver after the other, and says and shows what came out."""
    mesh = mesh_of(args)
    if mesh is not None:
        solvers = over_devices(solvers["DEER"].solver.solver, preset.points, mesh)
    # Data may be solved for to a tolerance beyond single precision.
    jax.config.update("jax_enable_x64", True)
    if args.steps is not None:
        preset = dataclasses.replace(preset, steps=args.steps)
    settings |= dict(preset=args.preset, seed=args.seed, **dataclasses.asdict(preset))
    output: Path = args.output
    start_run(output, settings, args.resume)

    task = make_task(preset, jr.key(args.seed))
    evaluate = eqx.filter_jit(task.evaluate)

    def metrics(model, prefix=""):
        return {f"{prefix}{key}": float(x) for key, x in evaluate(model).items()}

    models, histories, results = {}, {}, {}
    for name, solver in solvers.items():
        slug = name.lower()
        if args.solver not in ("all", slug):
            continue
        path = output / f"checkpoint_{slug}.eqx"
        model, history = models[name], histories[name] = train(name, task, solver, path)
        save_leaves(output / f"model_{slug}.eqx", model)
        results[name] = dict(
            **metrics(task.model, "untrained_"),
            **metrics(model),
            compile_seconds=float(history.compile_seconds),
            training_seconds=float(np.sum(history.seconds)),
            median_step_seconds=float(np.median(history.seconds)),
            # What other work on the machine disturbs least.
            fastest_step_seconds=float(np.min(history.seconds)),
        )
        if np.any(history.iterations > 0):
            results[name]["mean_iterations"] = float(np.mean(history.iterations))
    print_table(results)
    packages = ("diffrax", "diffrax-deer", "equinox", "jax", "jaxlib", "optax")
    differences = loss_differences(histories).values()
    summary = dict(
        settings=settings,
        solvers={
            name: dict(**result, training_loss=histories[name].losses.tolist())
            for name, result in results.items()
        },
        max_relative_loss_difference=max(map(np.max, differences), default=None),
        device=f"{jax.default_backend()} ({jax.devices()[0].device_kind})",
        versions={name: importlib.metadata.version(name) for name in packages},
    )
    write_json(output / "summary.json", summary)
    plot_losses(output / "loss.png", histories)
    task.plot(next(iter(models.values())), output)
    print(f"\nPlots: {', '.join(map(str, sorted(output.glob('*.png'))))}")


def print_table(results: dict[str, dict[str, float]]) -> None:
    """In Markdown."""
    print("\n|", *(f"| {name}" for name in results), "|")
    print("| ---" * (len(results) + 1), "|")
    for key in dict.fromkeys(key for result in results.values() for key in result):
        values = (
            f"| {result[key]:.3g}" if key in result else "|"
            for result in results.values()
        )
        print("|", key.replace("_", " "), *values, "|")


def loss_differences(histories: dict[str, History]) -> dict[str, np.ndarray]:
    """Relative to the first solver."""
    (_, first), *others = histories.items()
    return {
        name: np.abs(history.losses - first.losses) / np.abs(first.losses)
        for name, history in others
    }


_STYLE: Any = {
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 100,
}


@contextlib.contextmanager
def axes_of(
    path: Path, size: tuple[float, float], rows: int = 1, columns: int = 1
) -> Iterator[list[Axes]]:
    """Row after row. The legend of all that is labelled is below them."""
    # Neither needs nor opens a display, unlike `pyplot`.
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size)
        axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
        yield axes
        labelled: dict[str, Any] = {}
        for each in axes:
            for handle, label in zip(*each.get_legend_handles_labels()):
                labelled.setdefault(label, handle)
        if len(labelled) > 0:
            figure.legend(
                labelled.values(), labelled.keys(), loc="outside lower center", ncols=4
            )
        atomic_write(path, lambda file: figure.savefig(file, format="png"))


def plot_losses(path: Path, histories: dict[str, History]) -> None:
    with axes_of(path, (11, 4.4), columns=2) as (over_time, differences):
        for i, (name, history) in enumerate(histories.items()):
            seconds, losses = np.cumsum(history.seconds), history.losses
            over_time.plot(seconds, losses, color=f"C{i}", alpha=0.25, lw=0.8)
            # Over a twentieth of the run at a time.
            width = max(1, len(losses) // 20)
            mean = np.convolve(losses, np.ones(width) / width, mode="valid")
            over_time.plot(seconds[width - 1 :], mean, color=f"C{i}", label=name)
        for i, difference in enumerate(loss_differences(histories).values(), 1):
            # The logarithmic scale has no place for zero.
            difference = np.maximum(difference, 1e-17)
            differences.semilogy(difference, ".", ms=3, color=f"C{i}")
        over_time.set(
            title="Loss of batches, and its moving average",
            xlabel="time of all training steps so far, without compilation (s)",
            ylabel="loss",
        )
        if all(np.all(history.losses > 0) for history in histories.values()):
            over_time.set_yscale("log")
        differences.set(
            title=f"Relative difference of the losses\nfrom {next(iter(histories))}",
            xlabel="training step",
            ylabel="0, or less than 1e-17, is at 1e-17",
        )
