"""Learn the Hamiltonian of two bodies under gravity, from their trajectories.

A network H(y) is trained such that the solution of dy/dt = J grad H(y) follows the true
trajectories. So every training step solves a differential equation. This is done with
DEER, in parallel over time, and then once more with Tsit5, step after step: from the
same seed, on the same grid, and so with the same losses.

An interrupted run can be continued with --resume. On a CPU it then ends with exactly
the same parameters as if it had never been interrupted. (On a GPU that takes
XLA_FLAGS=--xla_gpu_deterministic_ops=true.)

The experiment is that of Lim et al., "Parallelizing non-linear sequential models over
the sequence length", ICLR 2024.
"""

import dataclasses
import functools as ft
import importlib.metadata
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, Literal, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _common import (
    argument_parser,
    batch_indices,
    device_description,
    save_leaves,
    save_plot,
    start_run,
    write_json,
)
from diffrax_deer import DeerAdjoint, DeerSolver
from jaxtyping import Array, Float, Int, PRNGKeyArray
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Preset:
    width: int
    depth: int
    # The number of steps of the solver, and of points of each trajectory.
    points: int
    time: float
    # The fractions of this time over which to train, one after the other.
    stages: tuple[float, ...]
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

    def horizon(self, step: int) -> float:
        stage = step * len(self.stages) // self.steps
        return self.stages[stage] * self.time


PRESETS = {
    "quick": Preset(
        width=32,
        depth=2,
        points=40,
        time=4.0,
        stages=(0.2, 0.4, 0.7, 1.0),
        num_train=128,
        num_val=16,
        num_test=16,
        batch_size=16,
        steps=1000,
        learning_rate=3e-2,
        checkpoint_every=50,
        dtype="float64",
    ),
    "smoke": Preset(
        width=8,
        depth=1,
        points=16,
        time=1.0,
        stages=(0.5, 1.0),
        num_train=8,
        num_val=2,
        num_test=2,
        batch_size=4,
        steps=20,
        learning_rate=1e-2,
        checkpoint_every=3,
        dtype="float64",
    ),
    "paper": Preset(
        width=64,
        depth=6,
        points=10_000,
        time=10.0,
        stages=(0.1, 0.25, 0.5, 0.75, 1.0),
        num_train=800,
        num_val=100,
        num_test=100,
        batch_size=16,
        steps=10_000,
        learning_rate=1e-3,
        checkpoint_every=100,
        dtype="float32",
    ),
}


#
# The two bodies. Both masses are 1, and so is the gravitational constant. A state is
# `(x1, x2, v1, v2)`, with two components each.
#


def true_hamiltonian(y: Float[Array, " 8"]) -> Float[Array, ""]:
    x1, x2, v1, v2 = jnp.split(y, 4)
    kinetic = (jnp.sum(v1**2) + jnp.sum(v2**2)) / 2
    return kinetic - 1 / jnp.linalg.norm(x1 - x2)


def vector_field(t, y, hamiltonian):
    del t
    dH_dx, dH_dv = jnp.split(jax.grad(hamiltonian)(y), 2)
    return jnp.concatenate([dH_dv, -dH_dx])


def initial_state(key) -> Float[Array, " 8"]:
    r_key, angle_key, speed_key = jr.split(key, 3)
    r = jr.uniform(r_key, minval=0.5, maxval=1.5)
    angle = jr.uniform(angle_key, maxval=2 * jnp.pi)
    circular_speed = jnp.sqrt(1 / (4 * r))
    speed = circular_speed * jr.uniform(speed_key, minval=0.7, maxval=1)
    x = r * jnp.array([jnp.cos(angle), jnp.sin(angle)])
    v = speed * jnp.array([-jnp.sin(angle), jnp.cos(angle)])
    return jnp.concatenate([x, -x, v, -v])


def save_times(horizon, points: int) -> Float[Array, " points"]:
    # In the middle of each step. At its end, it would depend on rounding whether a time
    # belongs to this step or to the next one. That may differ when Diffrax makes the
    # steps again to differentiate them, and the gradient then misses this point.
    return (jnp.arange(points) + 0.5) / points * horizon


@eqx.filter_jit
def simulate(
    y0s: Float[Array, "batch 8"], horizon: Float[Array, ""], points: int
) -> Float[Array, "batch points 8"]:
    """The true trajectories."""

    def solve(y0):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(vector_field),
            dfx.Dopri8(),
            t0=0.0,
            t1=horizon,
            dt0=None,
            y0=y0,
            args=true_hamiltonian,
            saveat=dfx.SaveAt(ts=save_times(horizon, points)),
            stepsize_controller=dfx.PIDController(rtol=1e-9, atol=1e-9),
        )
        return cast(Array, sol.ys)

    return jax.vmap(solve)(y0s.astype(jnp.float64)).astype(y0s.dtype)


#
# Solving with the network
#


@eqx.filter_jit
def predict(
    hamiltonian: eqx.nn.MLP,
    y0s: Float[Array, "batch 8"],
    horizon: Float[Array, ""],
    *,
    solver: dfx.AbstractSolver,
    points: int,
) -> tuple[Float[Array, "batch points 8"], Int[Array, " batch"] | None]:
    """Returns the trajectories, and the number of iterations made for each of them."""
    if isinstance(solver, DeerSolver):
        # The whole horizon is one window.
        steps, adjoint = 1, DeerAdjoint()
    else:
        steps, adjoint = points, dfx.RecursiveCheckpointAdjoint()

    def solve(y0):
        return dfx.diffeqsolve(
            dfx.ODETerm(vector_field),
            solver,
            t0=0.0,
            t1=horizon,
            dt0=horizon / steps,
            y0=y0,
            args=hamiltonian,
            saveat=dfx.SaveAt(ts=save_times(horizon, points)),
            adjoint=adjoint,
            max_steps=steps,
        )

    sol = jax.vmap(solve)(y0s)
    return cast(Array, sol.ys), sol.stats.get("num_iterations")


#
# Training
#


class Experiment(eqx.Module):
    """What all solvers start from."""

    train_y0s: Float[Array, "num_train 8"]
    val_y0s: Float[Array, "num_val 8"]
    test_y0s: Float[Array, "num_test 8"]
    hamiltonian: eqx.nn.MLP
    batch_key: PRNGKeyArray

    def __init__(self, preset: Preset, seed: int):
        data_key, model_key, self.batch_key = jr.split(jr.key(seed), 3)
        sizes = [preset.num_train, preset.num_val, preset.num_test]
        y0s = jax.vmap(initial_state)(jr.split(data_key, sum(sizes)))
        self.train_y0s, self.val_y0s, self.test_y0s = jnp.split(
            y0s.astype(preset.dtype), np.cumsum(sizes)[:-1]
        )
        self.hamiltonian = eqx.nn.MLP(
            in_size=8,
            out_size="scalar",
            width_size=preset.width,
            depth=preset.depth,
            activation=jax.nn.softplus,
            dtype=jnp.dtype(preset.dtype),
            key=model_key,
        )


class Learner(eqx.Module):
    """What a training step changes."""

    hamiltonian: eqx.nn.MLP
    opt_state: optax.OptState


class Batch(eqx.Module):
    indices: Int[Array, " batch"]
    y0s: Float[Array, "batch 8"]
    truth: Float[Array, "batch points 8"]
    horizon: Float[Array, ""]


class History(eqx.Module):
    """What every training step was like."""

    loss: np.ndarray
    seconds: np.ndarray
    # For each trajectory of the batch. Only with DEER.
    iterations: np.ndarray
    compile_seconds: np.ndarray


class Checkpoint(eqx.Module):
    """As each batch is a pure function of the seed and the step, `step` is the position
    of the random number generator, too.
    """

    learner: Learner
    step: int
    history: History


def make_train_step(solver, optimiser, points):
    def loss_fn(hamiltonian, batch):
        ys, iterations = predict(
            hamiltonian, batch.y0s, batch.horizon, solver=solver, points=points
        )
        return jnp.mean((ys - batch.truth) ** 2), iterations

    def train_step(learner: Learner, batch: Batch):
        (loss, iterations), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(
            learner.hamiltonian, batch
        )
        updates, opt_state = optimiser.update(grads, learner.opt_state)
        hamiltonian = eqx.apply_updates(learner.hamiltonian, updates)
        return Learner(hamiltonian, opt_state), loss, iterations

    return train_step


def initial_checkpoint(
    solver: dfx.AbstractSolver,
    optimiser: optax.GradientTransformation,
    preset: Preset,
    experiment: Experiment,
) -> Checkpoint:
    hamiltonian = experiment.hamiltonian
    opt_state = optimiser.init(eqx.filter(hamiltonian, eqx.is_array))
    history = History(
        loss=np.zeros(preset.steps),
        seconds=np.zeros(preset.steps),
        iterations=np.zeros((preset.steps, preset.batch_size), int),
        compile_seconds=np.zeros(()),
    )
    return Checkpoint(Learner(hamiltonian, opt_state), 0, history)


def train(
    name: str,
    solver: dfx.AbstractSolver,
    preset: Preset,
    experiment: Experiment,
    path: Path,
) -> tuple[eqx.nn.MLP, History]:
    optimiser = optax.adam(
        optax.cosine_decay_schedule(preset.learning_rate, preset.steps, alpha=0.05)
    )
    checkpoint = initial_checkpoint(solver, optimiser, preset, experiment)
    if path.exists():
        checkpoint = eqx.tree_deserialise_leaves(path, checkpoint)
    learner, history = checkpoint.learner, checkpoint.history
    if checkpoint.step == preset.steps:
        return learner.hamiltonian, history

    @ft.lru_cache(maxsize=1)
    def truth(horizon):
        horizon = jnp.asarray(horizon, preset.dtype)
        return simulate(experiment.train_y0s, horizon, preset.points)

    def make_batch(step):
        indices = batch_indices(
            experiment.batch_key, step, preset.num_train, preset.batch_size
        )
        horizon = preset.horizon(step)
        return Batch(
            indices=indices,
            y0s=experiment.train_y0s[indices],
            truth=truth(horizon)[indices],
            horizon=jnp.asarray(horizon, preset.dtype),
        )

    batch = make_batch(checkpoint.step)
    start = time.perf_counter()
    train_step = eqx.filter_jit(make_train_step(solver, optimiser, preset.points))
    # The horizon is an argument like any other, so this happens only once.
    train_step = train_step.lower(learner, batch).compile()  # pyright: ignore
    history.compile_seconds[()] += time.perf_counter() - start

    bar = tqdm(desc=name, initial=checkpoint.step, total=preset.steps, unit="step")
    for step in range(checkpoint.step, preset.steps):
        batch = make_batch(step)
        start = time.perf_counter()
        learner, *outputs = train_step(learner, batch)
        loss, iterations = jax.device_get(outputs)
        history.seconds[step] = time.perf_counter() - start
        history.loss[step] = loss
        if iterations is not None:
            history.iterations[step] = iterations

        done = step + 1
        if done % preset.checkpoint_every == 0 or done == preset.steps:
            save_leaves(path, Checkpoint(learner, done, history))
        text = f"loss {loss:.2e}, horizon {batch.horizon:.3g}"
        if iterations is not None:
            text += f", {np.mean(iterations):.1f} iterations"
        bar.set_postfix_str(text, refresh=False)
        bar.update()
    bar.close()
    return learner.hamiltonian, history


#
# Results
#


class Result(NamedTuple):
    hamiltonian: eqx.nn.MLP
    history: History
    untrained_val_loss: float
    val_loss: float
    test_loss: float


def evaluate(
    solver: dfx.AbstractSolver,
    preset: Preset,
    hamiltonian: eqx.nn.MLP,
    y0s: Float[Array, "batch 8"],
) -> float:
    horizon = jnp.asarray(preset.time, preset.dtype)
    truth = simulate(y0s, horizon, preset.points)
    ys, _ = predict(hamiltonian, y0s, horizon, solver=solver, points=preset.points)
    return float(jnp.mean((ys - truth) ** 2))


def run_solver(
    name: str,
    solver: dfx.AbstractSolver,
    preset: Preset,
    experiment: Experiment,
    output: Path,
) -> Result:
    val_y0s, test_y0s = experiment.val_y0s, experiment.test_y0s
    untrained = evaluate(solver, preset, experiment.hamiltonian, val_y0s)
    tqdm.write(f"{name}: validation loss {untrained:.2e} before training")
    path = output / f"checkpoint_{name.lower()}.eqx"
    hamiltonian, history = train(name, solver, preset, experiment, path)
    val_loss = evaluate(solver, preset, hamiltonian, val_y0s)
    test_loss = evaluate(solver, preset, hamiltonian, test_y0s)
    tqdm.write(
        f"{name}: validation loss {val_loss:.2e} after training "
        f"({untrained / val_loss:.0f} times less)"
    )
    save_leaves(output / f"model_{name.lower()}.eqx", hamiltonian)
    return Result(hamiltonian, history, untrained, val_loss, test_loss)


def loss_difference(results: dict[str, Result]) -> np.ndarray:
    """The relative difference of the losses in every step."""
    deer, tsit5 = (result.history.loss for result in results.values())
    return np.abs(deer - tsit5) / tsit5


def summarise(results: dict[str, Result], settings: dict[str, Any]) -> dict[str, Any]:
    solvers: dict[str, dict[str, Any]] = {
        name: dict(
            untrained_validation_loss=result.untrained_val_loss,
            validation_loss=result.val_loss,
            test_loss=result.test_loss,
            training_loss=result.history.loss.tolist(),
            compile_seconds=float(result.history.compile_seconds),
            training_seconds=float(np.sum(result.history.seconds)),
            median_step_seconds=float(np.median(result.history.seconds)),
        )
        for name, result in results.items()
    }
    if "DEER" in results:
        iterations = results["DEER"].history.iterations
        solvers["DEER"]["mean_iterations"] = float(np.mean(iterations))
    packages = ["diffrax-deer", "diffrax", "equinox", "jax", "jaxlib", "optax"]
    return dict(
        settings=settings,
        solvers=solvers,
        max_relative_loss_difference=float(np.max(loss_difference(results)))
        if len(results) == 2
        else None,
        device=device_description(),
        versions={name: importlib.metadata.version(name) for name in packages},
    )


def print_summary(summary: dict[str, Any]) -> None:
    rows = {
        "compilation": ("compile_seconds", "{:.1f} s"),
        "training, without compilation": ("training_seconds", "{:.1f} s"),
        "median training step": ("median_step_seconds", "{:.2g} s"),
        "validation loss, untrained": ("untrained_validation_loss", "{:.2e}"),
        "validation loss": ("validation_loss", "{:.2e}"),
        "test loss": ("test_loss", "{:.2e}"),
    }
    solvers = summary["solvers"]
    print(f"\n{summary['device']:30}" + "".join(f"{name:>12}" for name in solvers))
    for label, (key, form) in rows.items():
        values = (form.format(solver[key]) for solver in solvers.values())
        print(f"{label:30}" + "".join(f"{value:>12}" for value in values))
    if "DEER" in solvers:
        mean = solvers["DEER"]["mean_iterations"]
        print(f"{'iterations':30}{mean:>12.2f}")
    difference = summary["max_relative_loss_difference"]
    if difference is not None:
        print(
            f"\nThe two loss curves agree to a relative difference of {difference:.1e}."
        )


_COLOURS = {"DEER": "C0", "Tsit5": "C1"}


def plot_loss(path: Path, preset: Preset, results: dict[str, Result]) -> None:
    epoch = preset.num_train // preset.batch_size
    num_epochs = preset.steps // epoch

    def draw(time_axes, difference_axes=None):
        for name, result in results.items():
            history = result.history
            seconds, loss = np.cumsum(history.seconds), history.loss
            epoch_ends = epoch * np.arange(1, num_epochs + 1) - 1
            epoch_loss = loss[: epoch * num_epochs].reshape(num_epochs, epoch).mean(1)
            colour = _COLOURS[name]
            label = f"{name} (after {history.compile_seconds:.0f} s of compilation)"
            time_axes.semilogy(seconds, loss, color=colour, lw=0.8, alpha=0.25)
            time_axes.semilogy(
                seconds[epoch_ends], epoch_loss, color=colour, lw=1.8, label=label
            )
        time_axes.set(
            title="Training loss of batches and epochs\n(jumps as the horizon grows)",
            xlabel="wall-clock time, without compilation (s)",
            ylabel="mean squared error",
        )
        time_axes.legend()
        if difference_axes is not None:
            steps = np.arange(1, preset.steps + 1)
            # The logarithmic scale has no place for zero.
            difference = np.maximum(loss_difference(results), 1e-17)
            difference_axes.semilogy(steps, difference, "k.", ms=3)
            difference_axes.set(
                title="Difference between DEER and Tsit5",
                xlabel="training step",
                ylabel="relative difference of the losses",
            )

    columns = len(results)
    save_plot(path, draw, size=(5.5 * columns, 4.2), columns=columns)


def plot_trajectory(path: Path, ts: Array, truth: Array, learnt: Array) -> None:
    def draw(orbit_axes, time_axes):
        for body, colour in enumerate(["C0", "C3"]):
            x, y = 2 * body, 2 * body + 1
            for ys, label, style in (
                (truth, "truth", dict(alpha=0.35, lw=5)),
                (learnt, "learnt", dict(lw=1.5, ls="--")),
            ):
                style = dict(color=colour, label=f"body {body + 1}, {label}", **style)
                orbit_axes.plot(ys[:, x], ys[:, y], **style)
                time_axes.plot(ts, ys[:, x], **style)
            orbit_axes.plot(truth[0, x], truth[0, y], "o", color=colour)
        orbit_axes.set(
            title="Orbits of a held-out trajectory",
            xlabel="$x$",
            ylabel="$y$",
            aspect="equal",
        )
        time_axes.set(title="Its positions over time", xlabel="time $t$", ylabel="$x$")
        handles, labels = time_axes.get_legend_handles_labels()
        time_axes.figure.legend(handles, labels, loc="outside lower center", ncols=4)

    save_plot(path, draw, size=(10, 4.8), columns=2)


def plot_energy(path: Path, ts: Array, truth: Array, learnt: Array) -> None:
    def draw(axes):
        for ys, style in (
            (truth, dict(color="black", alpha=0.35, lw=5, label="truth")),
            (learnt, dict(color="C0", lw=1.5, ls="--", label="learnt")),
        ):
            axes.plot(ts, jax.vmap(true_hamiltonian)(ys), **style)
        axes.set(
            title="True energy along a held-out trajectory",
            xlabel="time $t$",
            ylabel="kinetic and potential energy",
        )
        axes.margins(y=0.5)
        axes.legend()

    save_plot(path, draw, size=(6.5, 4))


def main(argv: Sequence[str] | None = None) -> None:
    presets = dict(
        quick="ends within minutes on a CPU",
        smoke="only shows that everything works",
        paper="has the sizes of the paper, for a GPU",
    )
    parser = argument_parser(
        __doc__ or "", presets, ["deer", "tsit5"], "output/hamiltonian_nn"
    )
    args = parser.parse_args(argv)
    # The true trajectories are solved to a tolerance beyond single precision.
    jax.config.update("jax_enable_x64", True)

    preset = PRESETS[args.preset]
    if args.steps is not None:
        preset = dataclasses.replace(preset, steps=args.steps)
    settings = dict(preset=args.preset, seed=args.seed, **dataclasses.asdict(preset))
    start_run(args.output, settings, args.resume)

    experiment = Experiment(preset, args.seed)
    solvers = dict(
        DEER=DeerSolver(dfx.Tsit5(), substeps=preset.points),
        Tsit5=dfx.Tsit5(),
    )
    results = {
        name: run_solver(name, solver, preset, experiment, args.output)
        for name, solver in solvers.items()
        if args.solver in ("both", name.lower())
    }
    summary = summarise(results, settings)
    write_json(args.output / "summary.json", summary)
    print_summary(summary)

    plot_loss(args.output / "loss.png", preset, results)
    name, result = next(iter(results.items()))
    y0s, points = experiment.test_y0s, preset.points
    horizon = jnp.asarray(preset.time, preset.dtype)
    ts = save_times(horizon, points)
    truth = simulate(y0s, horizon, points)[0]
    learnt = predict(
        result.hamiltonian, y0s, horizon, solver=solvers[name], points=points
    )[0][0]
    plot_trajectory(args.output / "trajectory.png", ts, truth, learnt)
    plot_energy(args.output / "energy.png", ts, truth, learnt)
    print(f"Plots: {args.output}/{{loss,trajectory,energy}}.png")


if __name__ == "__main__":
    main()
