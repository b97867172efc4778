"""Events inside of the windows of `DeerAdjoint`."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
import pytest
from diffrax import ODETerm, RESULTS, SubSaveAt
from diffrax_deer import DeerAdjoint

from .helpers import deer, diffeqsolve, max_error, SaveAt


checkpointed = diffrax.RecursiveCheckpointAdjoint()
newton = optx.Newton(1e-10, 1e-10)
constant = diffrax.ConstantStepSize()
adaptive = diffrax.PIDController(rtol=1e-2, atol=1e-4)
heun = diffrax.Heun()
bosh3 = diffrax.Bosh3()
in_groups = DeerAdjoint(max_window_points=4)


def _oscillator(t, y, args):
    x, v = y
    return v, -args["a"] * x


def test_events_inside_windows():
    # At the ends of each of both windows, `x` is on the same side of all levels.
    directions = dict(any=None, down=False, up=True)
    level = lambda name: lambda t, y, args, **kwargs: y[0] - args[name]
    cond_fns: dict[str, Any] = {name: level(name) for name in directions}
    cond_fns["at_once"] = lambda t, y, args, **kwargs: args["at_once"] > 0
    event = diffrax.Event(cond_fns, newton, directions | dict(at_once=None))

    @jax.jit
    @jax.vmap
    def solve_and_jacobian(args):
        def solve(args):
            sol = diffeqsolve(
                ODETerm(_oscillator),
                deer(bosh3, 200),
                0,
                6,
                3,
                (0.0, 1.0),
                args,
                saveat=SaveAt(t1=True),
                event=event,
                adjoint=DeerAdjoint(),
                max_steps=2,
            )
            out = jnp.concatenate([sol.ts, *sol.ys])
            return out, (out, sol.event_mask)

        jac, (out, mask) = jax.jacrev(solve, has_aux=True)(args)
        return out, jac, mask

    def formula(args, name):
        w = jnp.sqrt(args["a"])
        if name == "none":
            t = 6.0
        elif name == "at_once":
            t = 0.0
        else:
            angle = jnp.arcsin(args[name] * w)
            t = (angle if name == "up" else jnp.pi - angle) / w
        return jnp.stack([t, jnp.sin(w * t) / w, jnp.cos(w * t)])

    never = dict(any=9.0, down=9.0, up=9.0, at_once=-1.0)
    # That of any direction is in the second window.
    once = dict(any=-0.5, down=0.5, up=0.4, at_once=1.0, none=None)
    batch = []
    for name, value in once.items():
        args = dict(a=1.3) | never
        batch.append(args if value is None else args | {name: value})
    batch = jtu.tree_map(lambda *x: jnp.stack(x), *batch)
    outs, jacs, masks = solve_and_jacobian(batch)
    for i, name in enumerate(once):
        args, jac, mask = jtu.tree_map(lambda x: x[i], (batch, jacs, masks))
        assert mask == {k: k == name for k in never}
        assert max_error(outs[i], formula(args, name)) < 1e-6
        assert max_error(jac, jax.jacrev(formula)(args, name)) < 1e-5


@eqx.filter_jit
def _solve_with_events(args, t1, solver, controller, adjoint, root_finder):
    boolean = lambda t, y, args, **kwargs: y[0] > args["above"]
    floating = lambda t, y, args, **kwargs: y[1] - args["level"]
    subs = dict(
        ts=SubSaveAt(ts=jnp.linspace(0, 1.5, 16)),
        all=SubSaveAt(t0=True, ts=jnp.linspace(0, 1.5, 4), steps=2, t1=True),
    )
    sol = diffeqsolve(
        ODETerm(_oscillator),
        solver,
        0,
        t1,
        0.11,
        (0.3, 1.0),
        args,
        saveat=SaveAt(subs=subs),
        stepsize_controller=controller,
        event=diffrax.Event([boolean, floating], root_finder),
        adjoint=adjoint,
        max_steps=32,
    )
    # Memory that is not used, in a way that can be compared.
    mark = lambda x: jnp.where(jnp.isinf(x), -1.0, x)
    ts, ys = jtu.tree_map(mark, (sol.ts, sol.ys))
    occurred = sol.result == RESULTS.event_occurred
    num_steps = sol.stats["num_steps"]
    return {k: (ts[k], ys[k]) for k in subs}, num_steps, sol.event_mask, occurred


@pytest.mark.parametrize(
    "solver,controller,adjoint,root_finder",
    (
        (heun, adaptive, DeerAdjoint(), newton),
        (deer(heun), constant, DeerAdjoint(), None),
        (deer(heun), constant, in_groups, newton),
    ),
    ids=("plain", "deer", "merged"),
)
def test_events_are_those_of_diffrax(solver, controller, adjoint, root_finder):
    for above, level, t1, num_steps, mask in (
        (9.0, 0.3, 2.0, 8, [False, True]),
        (0.7, 0.3, 2.0, 5, [True, False]),
        # Of two in the same step, the first counts.
        (0.89, 0.3, 2.0, 8, [True, False]),
        (9.0, -9.0, 2.0, 19, [False, False]),
        (9.0, 0.3, jnp.inf, 8, [False, True]),
        (0.7, 0.3, jnp.inf, 5, [True, False]),
        # At the very beginning.
        (0.0, 0.3, 2.0, 0, [True, False]),
    ):
        args = dict(a=1.3, above=above, level=level)
        args, t1 = jtu.tree_map(jnp.array, (args, t1))
        saved, *out = _solve_with_events(
            args, t1, solver, controller, adjoint, root_finder
        )
        expected, *ref = _solve_with_events(
            args, t1, heun, controller, checkpointed, root_finder
        )
        assert out == ref
        if controller is constant:
            assert out == [num_steps, mask, any(mask)]
        if root_finder is not None and not out[1][1]:
            # Diffrax then saves the last step twice.
            del saved["all"], expected["all"]
        assert max_error(saved, expected) < 1e-9


def test_bisection():
    # Which raises an error where there is no root.
    bisection = optx.Bisection(1e-10, 1e-10)
    decay = ODETerm(lambda t, y, args: -y)

    def solve(y0, cond_fn):
        sol = diffeqsolve(
            *(decay, heun, 0, 2, 0.1, y0),
            event=diffrax.Event(lambda t, y, args, **kwargs: cond_fn(y), bisection),
            adjoint=DeerAdjoint(),
        )
        return sol.ts[0], sol.event_mask

    half = lambda y: y - 0.5
    for cond_fn, t, occurs in (
        (lambda y: y + 1.0, 2.0, False),
        (lambda y: y < 0.5, 0.7, True),
        (half, jnp.log(2.0), True),
    ):
        time, mask = solve(1.0, cond_fn)
        assert max_error(time, t) < 5e-3 and mask == occurs
    # In a batch, also where it does not occur.
    dt_dy0 = jax.vmap(jax.value_and_grad(solve, has_aux=True), (0, None))
    (ts, mask), derivatives = dt_dy0(jnp.array([1.0, 20.0]), half)
    assert mask.tolist() == [True, False]
    assert max_error(ts, jnp.array([jnp.log(2.0), 2.0])) < 5e-3
    # Of `log(2 * y0)`.
    assert max_error(derivatives, jnp.array([1.0, 0.0])) < 1e-2


def test_dense_output_of_the_last_window():
    # Of which only a part has been solved.
    term, event = (
        ODETerm(_oscillator),
        diffrax.Event(lambda t, y, args, **kwargs: y[0] - 0.9, newton),
    )
    args, y0 = dict(a=1.0), (0.0, 1.0)

    def solve(solver, dt0, adjoint):
        return diffeqsolve(
            *(term, solver, 0, 3, dt0, y0, args),
            saveat=SaveAt(dense=True),
            event=event,
            adjoint=adjoint,
            max_steps=32,
        )

    sol = solve(deer(bosh3, 20), 2.0, DeerAdjoint())
    ref = solve(bosh3, 0.1, checkpointed)
    assert max_error(sol.t1, ref.t1) < 1e-9
    for t in (0.05, 0.63, 1.1):
        assert max_error(sol.evaluate(t), ref.evaluate(t)) < 1e-9
        assert max_error(sol.derivative(t), ref.derivative(t)) < 1e-9
