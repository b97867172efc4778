"""Learn networks f and g of an equation dX = f(X) dt + g(X) dW from some of its paths.

The data are some values of paths in a double well. From where each of them begins, the
networks make two paths. The loss is the energy score: how far these are from the data,
less half of how far they are from each other. (Gneiting and Raftery, "Strictly proper
scoring rules, prediction, and estimation", 2007.)

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
from _common import axes_of, batch_of, cli, Extras, Options, Preset, run, Task, ways
from jaxtyping import Array, Float, PRNGKeyArray


class SDEPreset(Preset):
    time: float
    num_steps: int
    observations: int
    width: int


PRESETS = {
    "quick": SDEPreset(
        **Options(num_train=4096, num_test=512, batch_size=64, steps=500),
        **Options(time=1, num_steps=64, observations=8, width=16, learning_rate=3e-2),
    ),
    "smoke": SDEPreset(
        **Options(num_train=32, num_test=16, batch_size=16, steps=20),
        **Options(time=1, num_steps=8, observations=4, width=4),
    ),
}
SOLVERS = ways(dfx.Euler())


class SDE(eqx.Module):
    drift: eqx.Module
    diffusion: eqx.Module


TRUTH = SDE(
    drift=eqx.nn.Lambda(lambda x: 2 * (x - x**3)),
    diffusion=eqx.nn.Lambda(lambda x: 0.3 * jnp.sqrt(1 + x**2)),
)


class Paths(eqx.Module):
    x0: Float[Array, " paths"]
    seen: Float[Array, "paths observations"]


class Fit(Task):
    preset: SDEPreset
    model: SDE
    train: Paths
    test: Paths
    key: PRNGKeyArray

    def __init__(self, preset: SDEPreset, key: PRNGKeyArray):
        keys, args = jr.split(key, 5), (preset.width, 2, jnp.tanh)
        network = lambda key, *f: eqx.nn.MLP("scalar", "scalar", *args, *f, key=key)
        self.preset, self.key = preset, keys[0]
        self.train = self.make_paths(keys[1], preset.num_train)
        self.test = self.make_paths(keys[2], preset.num_test)
        self.model = SDE(network(keys[3]), network(keys[4], jax.nn.softplus))

    @eqx.filter_jit
    def make_paths(self, key, num_paths):
        x0 = jr.uniform(key, (num_paths,), minval=-1.5, maxval=1.5)
        paths, _ = self.paths(TRUTH, x0, jr.split(key, num_paths))
        return Paths(x0, self.seen(paths))

    def paths(self, sde, x0s, keys, way=SOLVERS["Euler"]):
        """After each step, and the number of iterations."""
        time, steps = self.preset.time, self.preset.num_steps
        tol = time / steps / 2

        def solve(x0, key):
            path = dfx.VirtualBrownianTree(0, time, tol=tol, shape=(), key=key)
            drift = dfx.ODETerm(lambda t, x, args: sde.drift(x))
            diffusion = dfx.ControlTerm(lambda t, x, args: sde.diffusion(x), path)
            sol = dfx.diffeqsolve(
                dfx.MultiTerm(drift, diffusion),
                *(way.solver, 0, time, time / steps, x0),
                saveat=dfx.SaveAt(steps=True),
                adjoint=way.adjoint,
                max_steps=steps,
            )
            return sol.ys, sol.stats.get("num_iterations")

        return jax.vmap(solve)(x0s, keys)

    def seen(self, paths):
        every = self.preset.num_steps // self.preset.observations
        return paths[:, every - 1 :: every]

    def batch(self, step):
        paths = batch_of(self.train, self.key, step, self.preset)
        return paths, jr.split(jr.fold_in(self.key, step), 2 * len(paths.x0))

    def loss(self, model, batch, solver, memory):
        data, keys = batch
        x0 = jnp.concatenate([data.x0, data.x0])
        paths, iterations = self.paths(model, x0, keys, solver)
        one, other = jnp.split(self.seen(paths), 2)
        distance = lambda xs, ys: jnp.linalg.norm(xs - ys, axis=-1)
        to_data = (distance(one, data.seen) + distance(other, data.seen)) / 2
        return jnp.mean(to_data - distance(one, other) / 2), Extras(iterations)

    def evaluate(self, model):
        x = self.test.seen.reshape(-1)

        def error(name):
            truth, learnt = (jax.vmap(getattr(sde, name))(x) for sde in (TRUTH, model))
            return jnp.linalg.norm(learnt - truth) / jnp.linalg.norm(truth)

        return {f"error_of_{name}": error(name) for name in ("drift", "diffusion")}

    def plot(self, model, folder):
        ts = np.linspace(0, self.preset.time, self.preset.num_steps + 1)
        x0 = self.test.x0[:40]
        keys = jr.split(self.key, len(x0))
        low, high = np.quantile(self.test.seen, [0.01, 0.99])
        xs = jnp.linspace(low, high, 200)
        with axes_of(folder / "sde.png", (11, 8), rows=2, columns=2) as axes:
            for i, (name, sde) in enumerate(dict(truth=TRUTH, learnt=model).items()):
                paths = np.column_stack([x0, self.paths(sde, x0, keys)[0]])  # pyright: ignore
                axes[i].plot(ts, paths.T, color=f"C{i}", lw=0.6)
                title = f"Paths, {name} (from the same noise)"
                axes[i].set(title=title, xlabel="time", ylabel="$X$", ylim=(-2, 2))
                style = (Options(lw=5, alpha=0.4), Options(ls="--"))[i]
                for ax, part in zip(axes[2:], ("drift", "diffusion")):
                    ys = jax.vmap(getattr(sde, part))(xs)
                    ax.plot(xs, ys, color=f"C{i}", label=name, **style)
                    ax.set(xlabel="$X$ (where 98 % of the data are)", ylabel=part)
            axes[3].set_ylim(bottom=0)


if __name__ == "__main__":
    args = cli(__doc__, PRESETS, SOLVERS).parse_args()
    run(Fit, PRESETS[args.preset], SOLVERS, args)
