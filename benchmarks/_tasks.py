"""What there is to be solved."""

from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float

from . import _two_body
from ._problems import driven, van_der_pol, zoo


class Task(NamedTuple):
    name: str
    term: dfx.AbstractTerm
    # With a leading axis if this is a batch.
    y0: Float[Array, "*batch size"]
    # What there are derivatives with respect to, besides `y0`. Not batched.
    args: Any
    t1: float
    # Where to save. `None` is the end.
    ts: Float[Array, " saves"] | None = None
    # How many constant steps to make. If `None` then whatever reaches `error`.
    steps: int | None = None
    error: float = 1e-6

    @property
    def saveat(self) -> dfx.SaveAt:
        return dfx.SaveAt(t1=True) if self.ts is None else dfx.SaveAt(ts=self.ts)

    @property
    def times(self) -> Float[Array, " saves"]:
        return jnp.array([self.t1]) if self.ts is None else self.ts

    @property
    def is_batch(self) -> bool:
        return self.y0.ndim == 2

    def cast(self, dtype: Any, error: float) -> "Task":
        """The same in another precision."""
        name = f"{self.name}, {jnp.dtype(dtype).name}"
        return _cast(self, dtype)._replace(name=name, error=error)

    def batched(self, number: int) -> "Task":
        """That many initial values, each of them slightly different."""
        away = 1e-2 * jr.normal(jr.key(number), (number, self.y0.size))
        y0 = self.y0 * (1 + away.astype(self.y0.dtype))
        return self._replace(name=f"{self.name}, batch of {number}", y0=y0)


def _cast(tree, dtype):
    convert = lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x
    return jax.tree_util.tree_map(convert, tree)


def two_bodies(saves: int | None = None) -> Task:
    ts = None if saves is None else jnp.linspace(0, _two_body.T, saves)
    what = "final value" if saves is None else f"{saves:,} saves"
    y0 = _two_body.initial_value()
    return Task(f"two bodies, {what}", _two_body.term, y0, None, _two_body.T, ts)


def van_der_pol_oscillator() -> Task:
    problem = van_der_pol(10.0, 0)
    name = "van der Pol, final value"
    return Task(name, problem.term, problem.y0, None, problem.t1)


def lorenz() -> Task:
    problem = zoo("lorenz63", 5.0, 0)
    return Task("Lorenz, final value", problem.term, problem.y0, None, problem.t1)


def forced_oscillator(knots: int) -> Task:
    """A Duffing oscillator, and one step for each knot of what drives it."""
    t1 = 0.02 * knots
    force = jnp.cumsum(jr.normal(jr.key(0), (knots + 1,))) * 0.05
    force = force - jnp.linspace(0, 1, knots + 1) * force[-1]

    def vector_field(t, y, args):
        stiffness, force = args
        # The knots are equidistant: there is no need to search for them.
        position = jnp.clip(t / t1 * knots, 0, knots)
        index = jnp.minimum(position.astype(jnp.int32), knots - 1)
        weight = position - index
        forced = (1 - weight) * force[index] + weight * force[index + 1]
        x, v = y
        return jnp.stack([v, forced - 0.5 * v - x - stiffness * x**3])

    args = (jnp.array(1.0), force)
    y0 = jnp.array([1.0, 0.0])
    name = f"forced oscillator, {knots:,} steps"
    return Task(name, dfx.ODETerm(vector_field), y0, args, t1, steps=knots)


def latent_ode(steps: int) -> Task:
    problem = driven(64, 10.0, steps)
    name = f"neural ODE of 64, {steps:,} steps"
    return Task(name, problem.term, problem.y0, problem.args, problem.t1, steps=steps)


def neural_cde(observations: int) -> Task:
    """An Euler step for each observation."""
    size, channels = 8, 3
    keys = jr.split(jr.key(0), 2)
    xs = jnp.cumsum(0.03 * jr.normal(keys[0], (observations + 1, channels)), axis=0)
    ts = jnp.arange(observations + 1.0)
    mlp = eqx.nn.MLP(
        size, size * channels, 16, 1, final_activation=jnp.tanh, key=keys[1]
    )
    params, static = eqx.partition(mlp, eqx.is_array)

    def vector_field(t, y, params):
        del t
        matrix = eqx.combine(params, static)(y).reshape(size, channels)
        return matrix - 0.1 * y[:, None]

    control = dfx.LinearInterpolation(ts, xs)
    term = dfx.ControlTerm(vector_field, control)
    y0 = jnp.linspace(-1, 1, size)
    name = f"neural CDE, {observations:,} observations"
    t1 = float(observations)
    return Task(name, term, y0, params, t1, steps=observations)


def hamiltonian(points: int, *, steps: int | None = None) -> Task:
    """Two bodies, by a network that has learned their vector field."""
    network = _hamiltonian_network()
    params, static = eqx.partition(network, eqx.is_array)

    def vector_field(t, y, params):
        del t
        dx, dv = jnp.split(jax.grad(eqx.combine(params, static))(y), 2)
        return jnp.concatenate([dv, -dx])

    t1 = _two_body.T
    # In the middle of steps, as it must not depend on rounding which step one is in.
    ts = (jnp.arange(points) + 0.5) / points * t1
    what = f"{points:,} saves" if steps is None else f"{steps:,} steps, all saved"
    name = f"Hamiltonian network 6 x 64, {what}"
    term, y0 = dfx.ODETerm(vector_field), _two_body.initial_value()
    return Task(name, term, y0, params, t1, ts, steps)


def _hamiltonian_network(steps: int = 1000) -> eqx.nn.MLP:
    """6 x 64, as in the paper. Fitted to the true vector field, near to a trajectory:
    that takes seconds, and gives the same kind of network."""
    ts = jnp.linspace(0, _two_body.T, 1000)
    ys = _two_body.exact(_two_body.initial_value(), ts)
    assert ys is not None
    ys = ys.astype(jnp.float32)
    network = eqx.nn.MLP(
        8, "scalar", 64, 6, jax.nn.softplus, dtype=jnp.float32, key=jr.key(0)
    )
    optimiser = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def loss(network, y):
        dx, dv = jnp.split(jax.vmap(jax.grad(network))(y), 2, axis=1)
        actual = jnp.concatenate([dv, -dx], axis=1)
        expected = jax.vmap(lambda y: _two_body.vector_field(0, y, None))(y)
        return jnp.mean((actual - expected) ** 2)

    def body(carry, key):
        params, state = carry
        index_key, noise_key = jr.split(key)
        y = ys[jr.randint(index_key, (256,), 0, len(ys))]
        y = y + 0.03 * jr.normal(noise_key, y.shape, y.dtype)
        grads = jax.grad(lambda p: loss(eqx.combine(p, static), y))(params)
        updates, state = optimiser.update(grads, state)
        return (eqx.apply_updates(params, updates), state), None

    params, static = eqx.partition(network, eqx.is_array)
    carry = (params, optimiser.init(params))
    fit = jax.jit(lambda carry, keys: jax.lax.scan(body, carry, keys)[0])
    params, _ = fit(carry, jr.split(jr.key(1), steps))
    return eqx.combine(_cast(params, jnp.result_type(float)), static)
