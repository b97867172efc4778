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
from collections.abc import Sequence
from pathlib import Path
from typing import cast

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
from diffrax_deer import DeerAdjoint, DeerSolver
from jaxtyping import Array, Float, Int, PRNGKeyArray
from tqdm import tqdm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset(TrainingPreset):
    width: int
    depth: int
    # The number of steps of the solver, and of points of each trajectory.
    points: int
    time: float
    # The fractions of this time over which to train, one after the other.
    stages: tuple[float, ...]

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


class Batch(TrainingBatch):
    y0s: Float[Array, "batch 8"]
    truth: Float[Array, "batch points 8"]
    horizon: Float[Array, ""]


def train_with(
    name: str,
    solver: dfx.AbstractSolver,
    preset: Preset,
    experiment: Experiment,
    path: Path,
) -> tuple[eqx.nn.MLP, History]:
    optimiser = optax.adam(
        optax.cosine_decay_schedule(preset.learning_rate, preset.steps, alpha=0.05)
    )

    def loss_fn(hamiltonian, batch, guess):
        del guess
        ys, iterations = predict(
            hamiltonian, batch.y0s, batch.horizon, solver=solver, points=preset.points
        )
        return jnp.mean((ys - batch.truth) ** 2), Extras(iterations)

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

    return train(
        name,
        loss_fn,
        optimiser,
        experiment.hamiltonian,
        make_batch,
        preset,
        path,
        describe=lambda batch: f"horizon {batch.horizon:.3g}",
    )


#
# Results
#


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
    hamiltonian, history = train_with(name, solver, preset, experiment, path)
    val_loss = evaluate(solver, preset, hamiltonian, val_y0s)
    test_loss = evaluate(solver, preset, hamiltonian, test_y0s)
    tqdm.write(
        f"{name}: validation loss {val_loss:.2e} after training "
        f"({untrained / val_loss:.0f} times less)"
    )
    save_leaves(output / f"model_{name.lower()}.eqx", hamiltonian)
    metrics = dict(
        untrained_validation_loss=untrained,
        validation_loss=val_loss,
        test_loss=test_loss,
    )
    return Result(hamiltonian, history, metrics)


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
    summary = summarise(results, settings, packages=["diffrax"])
    write_json(args.output / "summary.json", summary)
    print_summary(
        summary,
        {
            "validation loss, untrained": ("untrained_validation_loss", "{:.2e}"),
            "validation loss": ("validation_loss", "{:.2e}"),
            "test loss": ("test_loss", "{:.2e}"),
        },
    )

    plot_loss(
        args.output / "loss.png",
        preset,
        results,
        colours=dict(DEER="C0", Tsit5="C1"),
        title="Training loss of batches and epochs\n(jumps as the horizon grows)",
        ylabel="mean squared error",
    )
    name, result = next(iter(results.items()))
    y0s, points = experiment.test_y0s, preset.points
    horizon = jnp.asarray(preset.time, preset.dtype)
    ts = save_times(horizon, points)
    truth = simulate(y0s, horizon, points)[0]
    learnt = predict(result.model, y0s, horizon, solver=solvers[name], points=points)[
        0
    ][0]
    plot_trajectory(args.output / "trajectory.png", ts, truth, learnt)
    plot_energy(args.output / "energy.png", ts, truth, learnt)
    print(f"Plots: {args.output}/{{loss,trajectory,energy}}.png")


if __name__ == "__main__":
    main()
