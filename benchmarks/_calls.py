"""Calls of Diffrax as they are written in practice, with all defaults left alone.

Every one is a function of the `diffeqsolve` that it calls.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.nn as jnn
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx


Diffeqsolve = Callable[..., dfx.Solution]


def mean_square(value: Any) -> jax.Array:
    return sum(jnp.mean(x**2) for x in jax.tree_util.tree_leaves(value))  # pyright: ignore


@dataclasses.dataclass(frozen=True)
class Call:
    solve: Callable[[Diffeqsolve, Any, Any], dfx.Solution]
    # What there are derivatives with respect to.
    params: Any
    # By how much the value and the derivative may differ from the original's.
    tolerance: float
    # What else `solve` is called with.
    data: Any = None
    read: Callable[[dfx.Solution], Any] = lambda sol: sol.ys
    loss: Callable[[Any], jax.Array] = mean_square
    # Differentiate the value twice, instead of the loss once.
    hessian: bool = False
    # What to compare derivatives with, if not with the original's: wherever a constant
    # step ends at a save point, the default adjoint's may be wrong.
    adjoint: dfx.AbstractAdjoint | None = None


def _split(module: eqx.Module) -> tuple[Any, Callable[[Any], Any]]:
    params, static = eqx.partition(module, eqx.is_array)
    return params, lambda params: eqx.combine(params, static)


def neural_ode() -> Call:
    params, whole = _split(eqx.nn.MLP(2, 2, 64, 2, jnn.softplus, key=jr.key(0)))

    def solve(diffeqsolve, params, data):
        ts, y0s = data
        mlp = whole(params)

        def one(y0):
            return diffeqsolve(
                dfx.ODETerm(lambda t, y, args: mlp(y)),
                dfx.Tsit5(),
                t0=ts[0],
                t1=ts[-1],
                dt0=ts[1] - ts[0],
                y0=y0,
                saveat=dfx.SaveAt(ts=ts),
                stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-6),
            )

        return jax.vmap(one)(y0s)

    y0s = jr.uniform(jr.key(1), (32, 2), minval=-1.0)
    return Call(solve, params, 1e-2, (jnp.linspace(0.0, 10.0, 100), y0s))


def latent_ode() -> Call:
    mlp = eqx.nn.MLP(16, 16, 16, 2, jnn.softplus, jnn.tanh, key=jr.key(0))
    params, whole = _split(mlp)

    def solve(diffeqsolve, params, data):
        mlp = whole(params)

        def one(ts, y0):
            return diffeqsolve(
                dfx.ODETerm(lambda t, y, args: mlp(y)),
                dfx.Tsit5(),
                ts[0],
                ts[-1],
                0.4,
                y0,
                saveat=dfx.SaveAt(ts=ts),
            )

        return jax.vmap(one)(*data)

    last = 2 + jr.uniform(jr.key(1), (256, 1))
    ts = jnp.sort(last * jr.uniform(jr.key(2), (256, 20)))
    y0s = jr.normal(jr.key(3), (256, 16))
    return Call(solve, params, 1e-3, (ts, y0s), adjoint=dfx.DirectAdjoint())


class _Gated(eqx.Module):
    """A network, every layer of which is gated and shifted by time."""

    layers: list[eqx.nn.Linear]
    gates: list[eqx.nn.Linear]
    shifts: list[eqx.nn.Linear]

    def __init__(self, sizes, key):
        keys = iter(jr.split(key, 3 * len(sizes)))
        pairs = list(zip(sizes, sizes[1:]))
        linear = lambda size_in, size: eqx.nn.Linear(size_in, size, key=next(keys))
        self.layers = [linear(*pair) for pair in pairs]
        self.gates = [linear(1, size) for _, size in pairs]
        self.shifts = [linear(1, size) for _, size in pairs]

    def __call__(self, t, y):
        t = jnp.asarray(t)[None]
        for i, layer in enumerate(self.layers):
            y = y if i == 0 else jnp.tanh(y)
            y = layer(y) * jnn.sigmoid(self.gates[i](t)) + self.shifts[i](t)
        return y


def _flow(exact: bool) -> Call:
    params, whole = _split(_Gated([2, 64, 64, 2], jr.key(0)))

    def solve(diffeqsolve, params, data):
        net = whole(params)

        def field(t, state, eps):
            f, vjp = jax.vjp(lambda y: net(t, y), state[0])
            if exact:
                return f, jnp.trace(jax.vmap(vjp)(jnp.eye(2))[0])
            else:
                return f, jnp.sum(vjp(eps)[0] * eps)

        def one(y, eps):
            # From the data back to the noise.
            y0 = (y, jnp.zeros(()))
            return diffeqsolve(
                dfx.ODETerm(field), dfx.Tsit5(), 0.5, 0.0, -0.05, y0, eps
            )

        return jax.vmap(one)(*data)

    def loss(value):
        z, log_density = value
        return jnp.mean(jnp.sum(z**2, axis=-1) / 2 - log_density)

    data = (jr.normal(jr.key(1), (32, 2)), jr.normal(jr.key(2), (32, 2)))
    last = lambda sol: jax.tree_util.tree_map(lambda y: y[:, -1], sol.ys)
    return Call(solve, params, 1e-3, data, read=last, loss=loss)


def neural_cde() -> Call:
    mlp = eqx.nn.MLP(8, 24, 128, 1, jnn.softplus, jnn.tanh, key=jr.key(0))
    params, whole = _split(mlp)

    def solve(diffeqsolve, params, data):
        ts, coeffs, y0s = data
        mlp = whole(params)

        def one(coeffs, y0):
            control = dfx.CubicInterpolation(ts, coeffs)
            field = lambda t, y, args: mlp(y).reshape(8, 3)
            return diffeqsolve(
                dfx.ControlTerm(field, control).to_ode(),
                dfx.Tsit5(),
                ts[0],
                ts[-1],
                None,
                y0,
                stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-6),
                saveat=dfx.SaveAt(t1=True),
            )

        return jax.vmap(one)(coeffs, y0s)

    # Spirals, each of its own phase, with time as another channel.
    ts = jnp.linspace(0, 4 * np.pi, 100)
    phases = 2 * np.pi * jr.uniform(jr.key(1), (32, 1)) + ts
    size = jnp.exp(-0.1 * ts)
    times = jnp.broadcast_to(ts, phases.shape)
    xs = jnp.stack([times, size * jnp.cos(phases), size * jnp.sin(phases)], axis=-1)
    coeffs = jax.vmap(dfx.backward_hermite_coefficients, in_axes=(None, 0))(ts, xs)
    return Call(solve, params, 2e-2, (ts, coeffs, jr.normal(jr.key(2), (32, 8))))


def neural_sde() -> Call:
    key1, key2 = jr.split(jr.key(0))
    drift = eqx.nn.MLP(17, 16, 16, 1, jnn.silu, jnn.tanh, key=key1)
    diffusion = eqx.nn.MLP(17, 48, 16, 1, jnn.silu, jnn.tanh, key=key2)
    params, whole = _split([drift, diffusion])  # pyright: ignore

    def solve(diffeqsolve, params, data):
        ts, y0s, keys = data
        drift, diffusion = whole(params)
        with_time = lambda t, y: jnp.concatenate([jnp.asarray(t)[None], y])

        def one(y0, key):
            dt0 = 1.0
            noise = dfx.VirtualBrownianTree(ts[0], ts[-1], dt0 / 2, (3,), key)
            field = lambda t, y, args: diffusion(with_time(t, y)).reshape(16, 3)
            return diffeqsolve(
                dfx.MultiTerm(
                    dfx.ODETerm(lambda t, y, args: drift(with_time(t, y))),
                    dfx.ControlTerm(field, noise),
                ),
                dfx.Heun(),
                ts[0],
                ts[-1],
                dt0,
                y0,
                saveat=dfx.SaveAt(ts=ts),
            )

        return jax.vmap(one)(y0s, keys)

    y0s, keys = jr.normal(jr.key(1), (64, 16)), jr.split(jr.key(2), 64)
    # Finer steps also see more of the noise: the value is then another one.
    data = (jnp.linspace(0.0, 63.0, 64), y0s, keys)
    return Call(solve, params, np.inf, data, adjoint=dfx.DirectAdjoint())


def kalman_filter() -> Call:
    a = np.array([[0.0, 1.0], [-1.0, -0.1]])
    c = np.array([[1.0, 0.0]])

    def solve(diffeqsolve, params, data):
        ts, measured = data
        process, measurement = params
        measurement_at = dfx.LinearInterpolation(ts, measured)

        def field(t, state, args):
            x, p = state
            gain = p @ c.T / measurement
            dx = a @ x + gain @ (measurement_at.evaluate(t) - c @ x)
            return dx, a @ p + p @ a.T + jnp.diag(process) - gain @ c @ p

        return diffeqsolve(
            dfx.ODETerm(field),
            dfx.Tsit5(),
            ts[0],
            ts[-1],
            ts[1] - ts[0],
            (jnp.zeros(2), jnp.eye(2)),
            saveat=dfx.SaveAt(ts=ts),
        )

    ts = jnp.linspace(0, 20, 401)
    measured = jnp.cos(ts) * jnp.exp(-0.05 * ts) + 0.1 * jr.normal(jr.key(0), ts.shape)
    params = jnp.array([0.1, 0.2]), jnp.array(0.5)
    adjoint = dfx.DirectAdjoint()
    return Call(solve, params, 1e-3, (ts, measured[:, None]), adjoint=adjoint)


def hessian() -> Call:
    # As in Diffrax's documentation, which says what `scan_kind` is for.
    def field(t, y, args):
        prey, predator = y
        a, b, c, d = args
        return a * prey - b * prey * predator, d * prey * predator - c * predator

    def solve(diffeqsolve, params, data):
        return diffeqsolve(
            dfx.ODETerm(field),
            dfx.Tsit5(scan_kind="bounded"),
            0,
            140,
            0.1,
            params,
            args=(0.1, 0.02, 0.4, 0.02),
        )

    params = jnp.array(10.0), jnp.array(10.0)
    return Call(solve, params, 1e-3, read=lambda sol: _prey(sol.ys), hessian=True)


def heat() -> Call:
    cells, length = 50, 2.0

    def field(t, y, diffusivity):
        padded = jnp.pad(y, 1)
        second = padded[2:] - 2 * y + padded[:-2]
        return diffusivity * second * (cells / length) ** 2

    def solve(diffeqsolve, params, y0):
        diffusivity, ts = params, jnp.linspace(0, 1, 50)
        return diffeqsolve(
            dfx.ODETerm(field),
            dfx.Tsit5(),
            0,
            1,
            1e-4,
            y0,
            diffusivity,
            saveat=dfx.SaveAt(ts=ts),
            stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-6),
        )

    y0 = jnp.sin(jnp.pi * (jnp.arange(cells) + 0.5) / cells) ** 2
    return Call(solve, jnp.array(0.5), 2e-2, y0)


def steady_state() -> Call:
    def field(t, y, args):
        source, rate = args
        flow = rate * y[0]
        return jnp.stack([source - flow, flow - y[1] ** 2])

    def solve(diffeqsolve, params, data):
        return diffeqsolve(
            dfx.ODETerm(field),
            dfx.Tsit5(),
            0,
            jnp.inf,
            None,
            jnp.array([1.0, 1.0]),
            params,
            max_steps=None,
            stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-6),
            event=dfx.Event(dfx.steady_state_event()),
            adjoint=dfx.ImplicitAdjoint(),
        )

    params = jnp.array([1.5, 2.0])
    return Call(solve, params, 2e-2, read=lambda sol: _last(sol.ys))


def stiff() -> Call:
    def field(t, y, args):
        k1, k2, k3 = args
        slow, fast, back = k1 * y[0], k2 * y[1] ** 2, k3 * y[1] * y[2]
        return jnp.stack([back - slow, slow - back - fast, fast])

    def solve(diffeqsolve, params, ts):
        return diffeqsolve(
            dfx.ODETerm(field),
            dfx.Kvaerno5(),
            0,
            100,
            2e-4,
            jnp.array([1.0, 0.0, 0.0]),
            params,
            saveat=dfx.SaveAt(ts=ts),
            stepsize_controller=dfx.PIDController(rtol=1e-8, atol=1e-8),
        )

    rates, ts = jnp.array([0.04, 3e7, 1e4]), jnp.logspace(-4, 2, 7)
    return Call(solve, rates, 1e-4, ts)


def reaction() -> Call:
    # The Brusselator, with diffusion along a line.
    cells = 32

    def field(t, y, diffusivity):
        u, v = jnp.pad(y[0], 1, constant_values=1), jnp.pad(y[1], 1, constant_values=3)
        diffuse = lambda x: diffusivity * (x[2:] - 2 * x[1:-1] + x[:-2]) * cells**2
        u, v, du, dv = u[1:-1], v[1:-1], diffuse(u), diffuse(v)
        return jnp.stack([1 + u**2 * v - 4 * u + du, 3 * u - u**2 * v + dv])

    def solve(diffeqsolve, params, y0):
        return diffeqsolve(
            dfx.ODETerm(field),
            dfx.Kvaerno5(),
            0,
            10,
            1e-3,
            y0,
            params,
            saveat=dfx.SaveAt(ts=jnp.linspace(0, 10, 21)),
            stepsize_controller=dfx.PIDController(rtol=1e-6, atol=1e-8),
        )

    x = (jnp.arange(cells) + 1) / (cells + 1)
    y0 = jnp.stack([1 + jnp.sin(2 * jnp.pi * x), jnp.full(cells, 3.0)])
    return Call(solve, jnp.array(0.02), 1e-4, y0)


def forced() -> Call:
    def solve(diffeqsolve, params, data):
        ts, forces = data
        force = dfx.LinearInterpolation(ts, forces)

        def field(t, y, args):
            stiffness, damping = args
            acceleration = force.evaluate(t) - stiffness * y[0] - damping * y[1]
            return jnp.stack([y[1], acceleration])

        return diffeqsolve(
            dfx.ODETerm(field),
            dfx.Tsit5(),
            ts[0],
            ts[-1],
            0.1,
            jnp.zeros(2),
            params,
            saveat=dfx.SaveAt(ts=jnp.linspace(ts[0], ts[-1], 501)),
        )

    ts = jnp.linspace(0, 50, 51)
    forces, params = jr.normal(jr.key(0), ts.shape), jnp.array([1.0, 0.2])
    return Call(solve, params, 1e-3, (ts, forces), adjoint=dfx.DirectAdjoint())


def bouncing_ball() -> Call:
    def field(t, y, args):
        gravity, drag = args
        return jnp.stack([y[1], -gravity - drag * y[1] * jnp.abs(y[1])])

    def solve(diffeqsolve, params, y0):
        hits_floor = lambda t, y, args, **kwargs: y[0]
        root_finder = optx.Newton(1e-5, 1e-5, optx.rms_norm)
        return diffeqsolve(
            dfx.ODETerm(field),
            dfx.Tsit5(),
            0,
            jnp.inf,
            0.1,
            y0,
            params,
            stepsize_controller=dfx.PIDController(rtol=1e-5, atol=1e-5),
            event=dfx.Event(hits_floor, root_finder),
        )

    params, y0 = jnp.array([9.81, 0.05]), jnp.array([10.0, 0.0])
    return Call(solve, params, 1e-3, y0, read=lambda sol: _last(sol.ts))


def many_saves() -> Call:
    def field(t, y, args):
        (m1, m2), g = args, 9.81
        a, b, u, v = y
        sin, cos = jnp.sin(a - b), jnp.cos(a - b)
        below = m1 + m2 * sin**2
        torque_a = -m2 * sin * (u**2 * cos + v**2)
        torque_a += g * (m2 * jnp.sin(b) * cos - (m1 + m2) * jnp.sin(a))
        torque_b = sin * ((m1 + m2) * u**2 + m2 * v**2 * cos)
        torque_b += g * (m1 + m2) * (jnp.sin(a) * cos - jnp.sin(b))
        return jnp.stack([u, v, torque_a / below, torque_b / below])

    def solve(diffeqsolve, params, ts):
        y0, masses = params
        return diffeqsolve(
            dfx.ODETerm(field),
            dfx.Tsit5(),
            ts[0],
            ts[-1],
            None,
            y0,
            masses,
            saveat=dfx.SaveAt(ts=ts),
            stepsize_controller=dfx.PIDController(rtol=1e-7, atol=1e-9),
        )

    params = jnp.array([1.0, 0.5, 0.0, 0.0]), jnp.array([1.0, 1.0])
    return Call(solve, params, 1e-3, jnp.linspace(0, 10, 10_001))


def _last(x):
    return x[-1]


def _prey(ys):
    (prey,), _ = ys
    return prey


# In single precision, as is the default, and in double precision.
SINGLE: dict[str, Callable[[], Call]] = {
    "neural ODE": neural_ode,
    "latent ODE": latent_ode,
    "CNF, exact": lambda: _flow(exact=True),
    "CNF, Hutchinson": lambda: _flow(exact=False),
    "neural CDE": neural_cde,
    "neural SDE": neural_sde,
}
DOUBLE: dict[str, Callable[[], Call]] = {
    "Kalman filter": kalman_filter,
    "Hessian": hessian,
    "heat equation": heat,
    "steady state": steady_state,
    "Robertson": stiff,
    "Brusselator": reaction,
    "forced": forced,
    "event": bouncing_ball,
    "10,001 saves": many_saves,
}
