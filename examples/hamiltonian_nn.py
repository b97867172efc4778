"""Learn the Hamiltonian of two bodies under gravity, from their trajectories.

A network H(y) is trained such that the solution of dy/dt = J grad H(y) follows them, as
in Lim et al., "Parallelizing non-linear sequential models over the sequence length",
ICLR 2024.

The same steps are made in three ways: one after the other, with Diffrax's default
adjoint and with DeerAdjoint, and jointly, with DEER. So the losses are the same. An
interrupted run can be continued with --resume, and on a CPU ends with exactly the same
parameters. (On a GPU with XLA_FLAGS=--xla_gpu_deterministic_ops=true.)
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from _common import axes_of, batch_of, cli, Extras, Options, Preset, run, Task, ways
from jaxtyping import Array, Float, PRNGKeyArray


class HNNPreset(Preset):
    width: int
    depth: int
    # Of each trajectory: how many steps the solver makes.
    points: int
    # Over which to train, one after the other.
    horizons: tuple[float, ...]


PRESETS = {
    "quick": HNNPreset(
        **Options(num_train=256, num_test=16, batch_size=16, steps=1500),
        **Options(width=32, depth=2, points=40, horizons=(0.6, 1.2, 2.0, 3.0)),
        **Options(learning_rate=3e-2),
    ),
    "smoke": HNNPreset(
        **Options(num_train=8, num_test=2, batch_size=4, steps=20),
        **Options(width=8, depth=1, points=16, horizons=(0.5, 1.0)),
    ),
    # The sizes of the paper, for a GPU.
    "paper": HNNPreset(
        **Options(num_train=800, num_test=100, batch_size=16, steps=10_000),
        **Options(
            width=64, depth=6, points=10_000, horizons=(1.0, 2.5, 5.0, 7.5, 10.0)
        ),
        **Options(learning_rate=1e-3, dtype="float32"),
    ),
}
SOLVERS = ways(dfx.Tsit5())


def true_hamiltonian(y):
    """Both masses are 1, and so is the gravitational constant."""
    x1, x2, v1, v2 = jnp.split(y, 4, axis=-1)
    kinetic = jnp.sum(v1**2 + v2**2, axis=-1) / 2
    return kinetic - 1 / jnp.linalg.norm(x1 - x2, axis=-1)


def vector_field(t, y, hamiltonian):
    dH_dx, dH_dv = jnp.split(jax.grad(hamiltonian)(y), 2)
    return jnp.concatenate([dH_dv, -dH_dx])


def initial_state(key: PRNGKeyArray) -> Float[Array, " 8"]:
    r, angle, speed = jr.uniform(key, (3,)) * jnp.array([1, 2 * jnp.pi, 0.3])
    # The speed is relative to that on a circle.
    r, speed = 0.5 + r, (0.7 + speed) / jnp.sqrt(4 * (0.5 + r))
    x = r * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    v = speed * jnp.stack([-jnp.sin(angle), jnp.cos(angle)])
    return jnp.concatenate([x, -x, v, -v])


@eqx.filter_jit
def solve(hamiltonian, y0s, horizon, points: int, way=SOLVERS["Tsit5"]):
    steps = 4 * points if hamiltonian is true_hamiltonian else points
    windows = steps // getattr(way.solver, "substeps", 1)
    # In the middle of steps. On their ends, Diffrax may miss the gradient of some.
    ts = (jnp.arange(points) + 0.5) / points * horizon
    solve_one = lambda y0: dfx.diffeqsolve(
        dfx.ODETerm(vector_field),
        *(way.solver, 0, horizon, horizon / windows, y0, hamiltonian),
        saveat=dfx.SaveAt(ts=ts),
        adjoint=way.adjoint,
        max_steps=windows,
    )
    return jax.vmap(solve_one)(y0s)


class Imitation(Task):
    preset: HNNPreset
    model: eqx.nn.MLP
    # Initial states, trajectories and the horizon: for each of the horizons.
    train: list[list[Array]]
    test: list[Array]
    key: PRNGKeyArray

    def __init__(self, preset: HNNPreset, key: PRNGKeyArray):
        train_key, test_key, model_key, self.key = jr.split(key, 4)
        sizes = (8, "scalar", preset.width, preset.depth, jax.nn.softplus)
        self.preset, points, dtype = preset, preset.points, jnp.dtype(preset.dtype)
        self.model = eqx.nn.MLP(*sizes, dtype=dtype, key=model_key)

        def make(key, size, horizon):
            y0s = jax.vmap(initial_state)(jr.split(key, size))
            truth = solve(true_hamiltonian, y0s, jnp.asarray(horizon), points).ys
            return [jnp.asarray(x, dtype) for x in (y0s, truth, horizon)]

        self.train = [make(train_key, preset.num_train, x) for x in preset.horizons]
        self.test = make(test_key, preset.num_test, preset.horizons[-1])

    def batch(self, step):
        *examples, horizon = self.train[step * len(self.train) // self.preset.steps]
        return (*batch_of(examples, self.key, step, self.preset), horizon)

    def loss(self, model, batch, solver, memory):
        y0s, truth, horizon = batch
        sol = solve(model, y0s, horizon, self.preset.points, solver)
        loss = jnp.mean((sol.ys - truth) ** 2)
        return loss, Extras(sol.stats.get("num_iterations"))

    def evaluate(self, model):
        y0s, truth, horizon = self.test
        ys = solve(model, y0s, horizon, self.preset.points).ys
        errors = jnp.abs(true_hamiltonian(ys) / true_hamiltonian(truth) - 1)
        loss, _ = self.loss(model, self.test, SOLVERS["Tsit5"], None)
        return dict(test_loss=loss, relative_error_of_energy=jnp.median(errors))

    def plot(self, model, folder):
        y0s, (truth, *_), horizon = self.test
        sol = solve(model, y0s[:1], horizon, self.preset.points)
        ts, learnt = sol.ts[0], sol.ys[0]  # pyright: ignore
        with axes_of(folder / "trajectory.png", (11, 5), columns=2) as (orbits, energy):
            for name, ys in dict(truth=truth, learnt=learnt).items():
                style = Options(lw=5, alpha=0.35) if name == "truth" else Options()
                for body in (0, 1):
                    style |= Options(color=f"C{body}", label=f"body {body + 1}, {name}")
                    orbits.plot(*ys[:, 2 * body : 2 * body + 2].T, **style)
                style |= Options(color="black", label=f"energy, {name}")
                energy.plot(ts, true_hamiltonian(ys), **style)
            orbits.set(title="A held-out trajectory", xlabel="$x$", ylabel="$y$")
            orbits.set_aspect("equal")
            energy.set(title="Its true energy", xlabel="time", ylabel="energy")
            energy.set_ylim(1.5 * float(true_hamiltonian(truth[0])), 0)


if __name__ == "__main__":
    args = cli(__doc__, PRESETS, SOLVERS, several_devices=True).parse_args()
    run(Imitation, PRESETS[args.preset], SOLVERS, args)
