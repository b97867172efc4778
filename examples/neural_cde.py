"""Tell which way noisy spirals turn, with a neural controlled differential equation.

Each spiral is seen at irregular times of its own. What is seen is interpolated
to a path X. A hidden state follows dz = f(z) dX, with a network f, and the answer is
linear in where it ends. (Kidger et al., "Neural controlled differential equations for
irregular time series", NeurIPS 2020.)

The same steps are made in three ways: one after the other, with Diffrax's default
adjoint and with DeerAdjoint, and jointly, with DEER. So the losses are the same.

An interrupted run can be continued with --resume.
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _common import axes_of, batch_of, cli, Extras, Options, Preset, run, Task, ways
from jaxtyping import Array, Float, PRNGKeyArray


class CDEPreset(Preset):
    observations: int
    hidden: int
    width: int


PRESETS = {
    "quick": CDEPreset(
        **Options(num_train=512, num_test=256, batch_size=32, steps=200),
        **Options(observations=100, hidden=6, width=24, learning_rate=1e-2),
    ),
    "smoke": CDEPreset(
        **Options(num_train=16, num_test=8, batch_size=8, steps=20),
        **Options(observations=10, hidden=3, width=4),
    ),
}
SOLVERS = ways(dfx.Heun())


class Spirals(eqx.Module):
    # From 0 to 1.
    ts: Float[Array, "spirals observations"]
    xs: Float[Array, "spirals observations 2"]
    # 1 for those that turn left, 0 for those that turn right.
    is_left: Float[Array, " spirals"]


def make_spiral(key: PRNGKeyArray, observations: int) -> Spirals:
    keys = jr.split(key, 5)
    ts = jnp.sort(jr.uniform(keys[0], (observations,))).at[0].set(0).at[-1].set(1)
    is_left = jr.bernoulli(keys[1]).astype(float)
    turns = (2 * is_left - 1) * jr.uniform(keys[2], minval=0.5, maxval=1.5)
    angles = 2 * jnp.pi * (jr.uniform(keys[3]) + turns * ts)
    xs = (1 - ts / 2) * jnp.stack([jnp.cos(angles), jnp.sin(angles)])
    return Spirals(ts, xs.T + 0.1 * jr.normal(keys[4], (observations, 2)), is_left)


class NeuralCDE(eqx.Module):
    initial: eqx.nn.Linear
    field: eqx.nn.MLP
    readout: eqx.nn.Linear

    def __init__(self, preset: CDEPreset, key: PRNGKeyArray):
        keys, hidden = jr.split(key, 3), preset.hidden
        self.initial = eqx.nn.Linear(3, hidden, key=keys[0])
        sizes = (hidden, 3 * hidden, preset.width, 1)
        self.field = eqx.nn.MLP(*sizes, jax.nn.softplus, jnp.tanh, key=keys[1])
        self.readout = eqx.nn.Linear(hidden, "scalar", key=keys[2])

    def __call__(self, ts, xs, way, saveat):
        """The logits of "left", at the times to save, and the number of iterations."""
        xs = jnp.column_stack([ts, xs])
        field = lambda t, z, args: self.field(z).reshape(-1, 3)
        sol = dfx.diffeqsolve(
            dfx.ControlTerm(field, dfx.LinearInterpolation(ts, xs)),
            *(way.solver, 0, 1, None, self.initial(xs[0])),
            stepsize_controller=dfx.StepTo(ts),
            saveat=saveat,
            adjoint=way.adjoint,
            max_steps=len(ts) - 1,
        )
        logits = jax.vmap(self.readout)(sol.ys)  # pyright: ignore
        return logits, sol.stats.get("num_iterations")


class Classification(Task):
    preset: CDEPreset
    model: NeuralCDE
    train: Spirals
    test: Spirals
    key: PRNGKeyArray

    def __init__(self, preset: CDEPreset, key: PRNGKeyArray):
        train_key, test_key, model_key, self.key = jr.split(key, 4)
        self.preset, self.model = preset, NeuralCDE(preset, model_key)
        make = jax.vmap(lambda key: make_spiral(key, preset.observations))
        self.train = make(jr.split(train_key, preset.num_train))
        self.test = make(jr.split(test_key, preset.num_test))

    def logits(self, model, spirals, way, saveat=dfx.SaveAt(t1=True)):
        solve = lambda ts, xs: model(ts, xs, way, saveat)
        return jax.vmap(solve)(spirals.ts, spirals.xs)

    def batch(self, step):
        return batch_of(self.train, self.key, step, self.preset)

    def loss(self, model, batch, solver, memory):
        logits, iterations = self.logits(model, batch, solver)
        losses = optax.sigmoid_binary_cross_entropy(logits[:, 0], batch.is_left)
        return jnp.mean(losses), Extras(iterations)

    def evaluate(self, model):
        logits, _ = self.logits(model, self.test, SOLVERS["Heun"])
        losses = optax.sigmoid_binary_cross_entropy(logits[:, 0], self.test.is_left)
        is_right = (logits[:, 0] > 0) == self.test.is_left
        return dict(test_loss=jnp.mean(losses), test_accuracy=jnp.mean(is_right))

    def plot(self, model, folder):
        some = jax.tree.map(lambda x: x[:24], self.test)
        saveat = dfx.SaveAt(t0=True, steps=True)
        logits, _ = self.logits(model, some, SOLVERS["Heun"], saveat)
        with axes_of(folder / "spirals.png", (13, 4.6), columns=3) as axes:
            for left, side in enumerate(["right", "left"]):
                members = np.flatnonzero(some.is_left == left)
                x, y = some.xs[members[0]].T
                axes[left].plot(x, y, color="black", alpha=0.2, lw=0.8)
                axes[left].scatter(x, y, c=some.ts[members[0]], zorder=2)
                axes[left].set(xlabel="$x$", ylabel="$y$", aspect="equal")
                axes[left].set(
                    title=f"What is seen of one that turns {side}\n(dark: at first)"
                )
                for i, label in zip(members, [f"turns {side}", *[None] * 99]):
                    style = Options(color=f"C{left}", lw=1, alpha=0.7, label=label)
                    axes[2].plot(some.ts[i], jax.nn.sigmoid(logits[i]), **style)
            axes[2].set(
                title="What the network makes of it so far\n(24 held-out spirals)"
            )
            axes[2].set(xlabel="time", ylabel="probability of turning left")


if __name__ == "__main__":
    args = cli(__doc__, PRESETS, SOLVERS).parse_args()
    run(Classification, PRESETS[args.preset], SOLVERS, args)
