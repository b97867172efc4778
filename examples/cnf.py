"""Learn a density in the plane with a continuous normalising flow.

The points of two moons move along dx/dt = f(t, x), with a network f, to where they are
to be distributed normally. The logarithm of the density is one more unknown: it changes
by the trace of the Jacobian of f, which is exact here. (Chen et al., "Neural ordinary
differential equations", NeurIPS 2018.) New points come from the opposite direction.

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


class FlowPreset(Preset):
    solver_steps: int
    width: int


PRESETS = {
    "quick": FlowPreset(
        **Options(num_train=4096, num_test=1024, batch_size=128, steps=300),
        **Options(solver_steps=16, width=32, learning_rate=1e-2),
    ),
    "smoke": FlowPreset(
        **Options(num_train=64, num_test=32, batch_size=32, steps=20),
        **Options(solver_steps=8, width=4),
    ),
}
SOLVERS = ways(dfx.Tsit5())


def make_point(key: PRNGKeyArray) -> Float[Array, " 2"]:
    """One of two half circles, with noise."""
    moon_key, angle_key, noise_key = jr.split(key, 3)
    angle = jr.uniform(angle_key, maxval=jnp.pi)
    upper = jnp.stack([jnp.cos(angle) - 0.5, jnp.sin(angle) - 0.25])
    point = jnp.where(jr.bernoulli(moon_key), upper, -upper)
    return 1.5 * point + 0.1 * jr.normal(noise_key, (2,))


class Flow(eqx.Module):
    network: eqx.nn.MLP
    steps: int = eqx.field(static=True)

    def velocity(self, t, x):
        return self.network(jnp.append(x, t))

    def with_divergence(self, t, state, args):
        x, _ = state
        f = lambda x: self.velocity(t, x)
        return f(x), jnp.trace(jax.jacfwd(f)(x))

    def log_density(self, x, way):
        """Also returns the number of iterations."""
        sol = dfx.diffeqsolve(
            dfx.ODETerm(self.with_divergence),
            *(way.solver, 0, 1, 1 / self.steps, (x, jnp.zeros(()))),
            adjoint=way.adjoint,
            max_steps=self.steps,
        )
        z, change = (leaf[-1] for leaf in sol.ys)  # pyright: ignore
        log_normal = -jnp.sum(z**2) / 2 - jnp.log(2 * jnp.pi)
        return log_normal + change, sol.stats.get("num_iterations")

    def generate(self, z):
        """The way from a point of the normal distribution, backwards in time."""
        term = dfx.ODETerm(lambda t, x, args: self.velocity(t, x))
        saveat = dfx.SaveAt(t0=True, steps=True)
        dt0 = -1 / self.steps
        solver = dfx.Tsit5()
        return dfx.diffeqsolve(
            term, solver, 1, 0, dt0, z, saveat=saveat, max_steps=self.steps
        ).ys


class Density(Task):
    preset: FlowPreset
    model: Flow
    train: Float[Array, "points 2"]
    test: Float[Array, "points 2"]
    key: PRNGKeyArray

    def __init__(self, preset: FlowPreset, key: PRNGKeyArray):
        train_key, test_key, model_key, self.key = jr.split(key, 4)
        network = eqx.nn.MLP(3, 2, preset.width, 2, jnp.tanh, key=model_key)
        self.preset, self.model = preset, Flow(network, preset.solver_steps)
        self.train = jax.vmap(make_point)(jr.split(train_key, preset.num_train))
        self.test = jax.vmap(make_point)(jr.split(test_key, preset.num_test))

    def batch(self, step):
        return batch_of(self.train, self.key, step, self.preset)

    def loss(self, model, batch, solver, memory):
        log_density = lambda x: model.log_density(x, solver)
        log_densities, iterations = jax.vmap(log_density)(batch)
        return -jnp.mean(log_densities), Extras(iterations)

    def on_grid(self, model, points=101):
        """The density at the middle of cells that fill a square, and their area."""
        edges = jnp.linspace(-4, 4, points)
        grid = jnp.stack(jnp.meshgrid(edges, edges), axis=-1).reshape(-1, 2)
        log_density = lambda x: model.log_density(x, SOLVERS["Tsit5"])[0]
        density = jnp.exp(jax.lax.map(log_density, grid, batch_size=1024))
        return edges, density.reshape(points, points)

    def evaluate(self, model):
        loss, _ = self.loss(model, self.test, SOLVERS["Tsit5"], None)
        edges, density = self.on_grid(model)
        mass = jnp.sum(density) * (edges[1] - edges[0]) ** 2
        return dict(test_loss=loss, integral_of_density=mass)

    def plot(self, model, folder):
        zs = jr.normal(self.key, (1000, 2))
        ways = np.asarray(jax.vmap(model.generate)(zs))
        edges, density = self.on_grid(model)
        with axes_of(folder / "density.png", (13, 4.8), columns=3) as axes:
            data, flow, learnt = axes
            data.plot(*self.test[:1000].T, ".", ms=3)
            data.set(title="Held-out data")
            flow.plot(*ways[:60].T, color="black", lw=0.4)
            flow.plot(
                *ways[:, 0].T, ".", ms=2, alpha=0.3, color="C2", label="from here"
            )
            flow.plot(*ways[:, -1].T, ".", ms=3, color="C1", label="to there")
            flow.set(title="New points, and the ways of some of them")
            image = learnt.pcolormesh(edges, edges, density, cmap="viridis")
            learnt.figure.colorbar(image, ax=learnt)
            learnt.set(title="The density that has been learnt")
            for ax in axes:
                ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
                ax.set(xlim=(-3, 3), ylim=(-3, 3))


if __name__ == "__main__":
    args = cli(__doc__, PRESETS, SOLVERS).parse_args()
    run(Density, PRESETS[args.preset], SOLVERS, args)
