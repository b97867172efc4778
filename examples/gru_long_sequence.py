"""Classify sequences of 17,984 samples by events far apart, with a GRU.

Each sequence is noise with two bumps far apart. The class is in which of two channels
these are. (A variant of the temporal order problem of Hochreiter and Schmidhuber, "Long
short-term memory", 1997. The length is that of Lim et al., "Parallelizing non-linear
sequential models over the sequence length", ICLR 2024.)

The GRU is trained with jax.lax.scan, and once more with deer_scan, in parallel over the
samples. On a CPU that takes far more time.

An interrupted run can be continued with --resume. With --data, others are classified:
FILE.npz with arrays `x` of shape (samples, length, channels) and `y` of integers, or
FILE.ts as in the UEA archive, for which aeon has to be installed.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _common import axes_of, batch_of, cli, Extras, Options, Preset, run, Task
from _sequences import Dataset, load, Sequences
from diffrax import RESULTS
from diffrax_deer import deer_scan_solution
from jaxtyping import PRNGKeyArray


class GRUPreset(Preset):
    hidden: int
    length: int
    bump_width: int


PRESETS = {
    "quick": GRUPreset(
        **Options(num_train=256, num_test=128, batch_size=16, steps=320),
        **Options(hidden=8, length=2048, bump_width=32),
    ),
    "smoke": GRUPreset(
        **Options(num_train=16, num_test=8, batch_size=8, steps=100),
        **Options(hidden=3, length=48, bump_width=6),
    ),
    # For a GPU.
    "full": GRUPreset(
        **Options(num_train=512, num_test=128, batch_size=16, steps=600),
        **Options(hidden=8, length=17_984, bump_width=256, dtype="float32"),
    ),
}


class Classifier(eqx.Module):
    cell: eqx.nn.GRUCell
    readout: eqx.nn.Linear

    def __init__(self, preset: GRUPreset, channels: int, classes: int, key):
        keys, size, dtype = jr.split(key, 3), preset.hidden, jnp.dtype(preset.dtype)
        cell = eqx.nn.GRUCell(channels, size, dtype=dtype, key=keys[0])
        # With the update gate at sigmoid(log(time)), a number is remembered for this
        # time. (Tallec, Ollivier: "Can recurrent neural networks warp time?", 2018.)
        times = jr.uniform(keys[1], (size,), dtype, minval=1, maxval=preset.length)
        bias = cell.bias.at[size : 2 * size].set(jnp.log(times))  # pyright: ignore
        self.cell = eqx.tree_at(lambda cell: cell.bias, cell, bias)
        self.readout = eqx.nn.Linear(size, classes, dtype=dtype, key=keys[2])

    def recurrence(self):
        step = lambda state, x: (self.cell(x, state),) * 2
        return step, jnp.zeros_like(self.cell.bias_n)  # pyright: ignore


def sequential_scan(model, x, guess):
    return jax.lax.scan(*model.recurrence(), x)[0], Extras()  # pyright: ignore


def parallel_scan(model, x, guess):
    # What `deer_scan` does, but with the number of iterations and all states.
    sol = deer_scan_solution(*model.recurrence(), x, guess=guess.astype(x.dtype))  # pyright: ignore
    final = sol.result.error_if(sol.carry, sol.result != RESULTS.successful)
    return final, Extras(sol.num_iterations, sol.carries.astype(jnp.float16))


SOLVERS = {"lax.scan": sequential_scan, "deer_scan": parallel_scan}


class Classification(Task):
    preset: GRUPreset
    model: Classifier
    train: Dataset
    test: Dataset
    key: PRNGKeyArray

    def __init__(self, preset: GRUPreset, key: PRNGKeyArray, data: Sequences):
        self.preset, (model_key, split_key, self.key) = preset, jr.split(key, 3)
        self.train, self.test = data.split(split_key, preset.num_train, preset.dtype)
        sizes = data.x.shape[2], len(np.unique(data.y))
        self.model = Classifier(preset, *sizes, model_key)

    def memory(self, solver):
        # Once the gates have learnt to open and close, it takes dozens of iterations
        # from a constant, but only about five from (about) those of the previous visit.
        states = (self.preset.num_train, self.preset.length, self.preset.hidden)
        return jnp.zeros(states, jnp.float16) if solver is parallel_scan else None

    def batch(self, step):
        return batch_of(self.train, self.key, step, self.preset)

    def scores(self, model, batch, solver, memory):
        guess = jax.tree.map(lambda states: states[batch.index], memory)
        final, extras = jax.vmap(solver, (None, 0, 0))(model, batch.xs, guess)
        replace = lambda states, new: states.at[batch.index].set(new)
        memory = jax.tree.map(replace, memory, extras.memory)
        logits = jax.vmap(model.readout)(final)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.ys)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch.ys)
        return jnp.mean(losses), accuracy, Extras(extras.iterations, memory)

    def loss(self, model, batch, solver, memory):
        loss, _, extras = self.scores(model, batch, solver, memory)
        return loss, extras

    def evaluate(self, model):
        loss, accuracy, _ = self.scores(model, self.test, sequential_scan, None)
        return dict(test_loss=loss, test_accuracy=accuracy)

    def plot(self, model, folder):
        classes, members = np.unique(self.test.ys, return_index=True)
        columns = min(4, len(classes))
        with axes_of(folder / "sequences.png", (4 * columns, 6), 2, columns) as axes:
            for i, above, below in zip(range(columns), axes, axes[columns:]):
                x = self.test.xs[members[i]]
                above.plot(x[:, :6] - 9 * np.arange(min(6, x.shape[1])), lw=0.4)
                above.set(title=f"A held-out sequence of class {classes[i]}", yticks=[])
                _, states = jax.lax.scan(*model.recurrence(), x)  # pyright: ignore
                so_far = jax.nn.softmax(jax.vmap(model.readout)(states)).T
                for label, p in enumerate(so_far[:6]):
                    below.plot(p, lw=1 + (label == classes[i]), label=f"class {label}")
                below.set(xlabel="sample", ylabel="probability so far (thick: truth)")


if __name__ == "__main__":
    parser = cli(__doc__, PRESETS, SOLVERS)
    parser.add_argument("--data", type=Path, help="classify these, .npz or .ts")
    args = parser.parse_args()
    preset, data = load(args.data, PRESETS[args.preset], jr.key(args.seed))
    task = lambda preset, key: Classification(preset, key, data)
    run(task, preset, SOLVERS, args, data_sha256=data.sha256)
