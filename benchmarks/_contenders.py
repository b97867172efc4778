"""Who solves it. What users could do instead of using this project is the reason why
there are so many."""

import dataclasses
import functools as ft
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate
from diffrax_deer import DeerAdjoint, DeerSolver
from jax.experimental.ode import odeint
from jaxtyping import Array, Float

from ._tasks import Task


# `(y0, args) -> ys`, of one element of the batch. `ys` has the shape `(saves, size)`.
Solve = Callable[[Array, Any], Float[Array, "saves size"]]

# More steps than this take minutes on a GPU, one after the other.
_MAX_SEQUENTIAL = 100_000
_MAX_GRADIENT_ON_GPU = 10_000
_DEFAULT: dfx.AbstractAdjoint = dfx.RecursiveCheckpointAdjoint()


@dataclasses.dataclass(frozen=True)
class Contender:
    """`make(task, knob)` solves it. The knob is what decides on how accurately: either
    a tolerance or a number of steps.
    """

    make: Callable[[Task, Any], Solve]
    knobs: tuple[float, ...]
    # Whether there has to be another program for every knob.
    is_static: bool = True
    has_gradient: bool = True
    # Whether it cannot be compiled by JAX.
    on_host: bool = False

    def solves(self, task: Task) -> dict[float, tuple[Callable, tuple]]:
        """For every knob a function, and its arguments beside those of the task."""
        if self.is_static:
            functions = {knob: self.make(task, knob) for knob in self.knobs}
            return {knob: (batched(task, fn), ()) for knob, fn in functions.items()}
        solve = batched(task, lambda y0, args, knob: self.make(task, knob)(y0, args))
        return {knob: (solve, (knob,)) for knob in self.knobs}


def batched(task: Task, solve: Callable) -> Callable:
    if not task.is_batch:
        return solve
    return lambda y0, *rest: jax.vmap(lambda y0: solve(y0, *rest))(y0)


def contenders(task: Task, suite: str) -> dict[str, Contender]:
    """The first one is what the others are compared with."""
    steps = task.steps
    if steps is not None:
        constant = lambda solve: Contender(solve, (steps,))
        solver = _solver_of_steps(task)
        name = type(solver).__name__
        deer = {"DeerSolver, one window": constant(ft.partial(_one_window, solver))}
        if steps > _MAX_SEQUENTIAL:
            return deer
        deer[f"{name}, constant steps"] = Contender(
            ft.partial(_constant, solver, _DEFAULT),
            (steps,),
            has_gradient=suite != "gpu" or steps <= _MAX_GRADIENT_ON_GPU,
        )
        if suite == "gpu":
            return deer
        return {
            **deer,
            f"{name}, constant steps, DeerAdjoint": constant(
                ft.partial(_constant, solver, DeerAdjoint())
            ),
        }
    tolerances = tuple(task.error * 10.0**-i for i in range(-1, 4))
    # Their errors add up over the interval.
    lower = tolerances[1:]
    substeps = (128, 256) if suite == "gpu" else (64, 128, 256, 512)

    def adaptive(solver, knobs, adjoint=_DEFAULT):
        make = ft.partial(_adaptive, solver, adjoint)
        return Contender(make, knobs, is_static=False)

    tsit5 = dfx.Tsit5()
    out = {
        "DeerSolver, one window": Contender(ft.partial(_one_window, tsit5), substeps),
        "DeerSolver, adaptive windows": adaptive(DeerSolver(), lower, DeerAdjoint()),
        "Tsit5": adaptive(tsit5, lower),
        "Tsit5, DeerAdjoint": adaptive(tsit5, lower, DeerAdjoint()),
        "Tsit5, constant steps": Contender(
            ft.partial(_constant, tsit5, _DEFAULT), substeps
        ),
        "Dopri8": adaptive(dfx.Dopri8(), tolerances),
        "Kvaerno5": adaptive(dfx.Kvaerno5(), tolerances),
        "jax odeint": Contender(_odeint, lower),
        "SciPy DOP853": Contender(_scipy, tolerances, has_gradient=False, on_host=True),
    }
    if suite != "full":
        # What takes longest to measure, and tells least: these are not stiff, and the
        # steps can be chosen.
        del out["Kvaerno5"], out["Tsit5, constant steps"]
    if task.is_batch:
        # One after the other is not how one would use these.
        del out["SciPy DOP853"]
    if suite == "gpu" and task.is_batch:
        # Compilation takes most of the time there.
        keep = ("DeerSolver, one window", "Tsit5", "Tsit5, DeerAdjoint")
        out = {name: out[name] for name in keep}
    return out


def peers(paths: list[Path]) -> tuple[dict[str, Contender], dict[str, str]]:
    """The research code for DEER and for ELK, and of what is missing the reason. They
    only find the final value."""
    sys.path += [str(path) for path in paths]
    found, missing = {}, {}
    for name, module, make, knobs in (
        ("DEER (original)", "deer.fsolve_ivp", _original_deer, (16_000, 64_000)),
        ("ELK (original), undamped", "elk.algs.elk", _original_elk, (8, 16, 32)),
    ):
        try:
            importlib.import_module(module)
        except Exception as e:
            missing[name] = f"{type(e).__name__}: {e}"
        else:
            found[name] = Contender(make, knobs)
    return found, missing


def reference(task: Task) -> Solve:
    """The solution, as far as double precision goes. On given steps, the same ones."""
    if task.steps is None:
        controller = dfx.PIDController(rtol=1e-12, atol=1e-12)
        args = (dfx.Dopri8(), None, _DEFAULT, controller, 2**15)
    else:
        dt0, controller = task.t1 / task.steps, dfx.ConstantStepSize()
        args = (_solver_of_steps(task), dt0, _DEFAULT, controller, 2 * task.steps)
    return _solve(task, *args, throw=True)


def _solver_of_steps(task):
    return dfx.Euler() if isinstance(task.term, dfx.ControlTerm) else dfx.Tsit5()


def _solve(task, solver, dt0, adjoint, controller, max_steps, throw=False) -> Solve:
    def solve(y0, args):
        # In the precision of the state.
        time = lambda t: jnp.asarray(t, y0.dtype)
        sol = dfx.diffeqsolve(
            *(task.term, solver, time(0), time(task.t1)),
            None if dt0 is None else time(dt0),
            *(y0, args),
            saveat=task.saveat,
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=max_steps,
            throw=throw,
        )
        okay = sol.result == dfx.RESULTS.successful
        return jnp.where(okay, jnp.asarray(sol.ys), jnp.nan)

    return solve


def _adaptive(solver, adjoint, task, tol):
    controller = dfx.PIDController(rtol=tol, atol=tol)
    return _solve(task, solver, None, adjoint, controller, 4096)


def _constant(solver, adjoint, task, steps):
    # Rounding errors may leave another step to be made.
    controller = dfx.ConstantStepSize()
    return _solve(task, solver, task.t1 / steps, adjoint, controller, steps + 1)


def _one_window(solver, task, substeps):
    solver = DeerSolver(solver, substeps)
    controller = dfx.ConstantStepSize()
    return _solve(task, solver, task.t1, DeerAdjoint(), controller, 1)


def _odeint(task, tol):
    # It begins at the first of the times that it is asked for.
    has_t0 = bool(task.times[0] == 0)

    def solve(y0, args):
        vector_field = lambda y, t, args: task.term.vf(t, y, args)
        ts = task.times if has_t0 else jnp.append(0, task.times)
        ys = odeint(vector_field, y0, ts.astype(y0.dtype), args, rtol=tol, atol=tol)
        return ys if has_t0 else ys[1:]

    return solve


def _scipy(task, tol):
    # As one would who has the vector field in JAX. It is mostly the calls that cost.
    vector_field = jax.jit(task.term.vf)

    def solve(y0, args):
        sol = scipy.integrate.solve_ivp(
            lambda t, y: np.asarray(vector_field(t, y, args)),
            (0, task.t1),
            np.asarray(y0),
            method="DOP853",
            t_eval=np.asarray(task.times),
            rtol=tol,
            atol=tol,
        )
        return jnp.asarray(sol.y.T)

    return solve


def _original_deer(task, points):
    solve_ivp = importlib.import_module("deer.fsolve_ivp").solve_ivp

    def solve(y0, args):
        ts = jnp.linspace(0, task.t1, points + 1).astype(y0.dtype)
        vector_field = lambda y, t, args: task.term.vf(t[0], y, args)
        return solve_ivp(vector_field, y0, ts[:, None], args, ts).value[-1:]

    return solve


def _original_elk(task, iterations):
    """A recurrence is what it takes: the steps that this project makes, too. The number
    of iterations is up to the user. (Undamped: its damping does not work with versions
    of its Kalman filter that work with today's JAX.)"""
    elk_alg = importlib.import_module("elk.algs.elk").elk_alg
    substeps = 256

    def solve(y0, args):
        tsit5 = dfx.Tsit5(scan_kind="bounded")  # Can be differentiated.
        dt = jnp.asarray(task.t1 / substeps, y0.dtype)

        def step(y, t0):
            step = (task.term, t0[0], t0[0] + dt, y, args)
            return tsit5.step(*step, tsit5.init(*step), made_jump=False)[0]

        t0s = dt * jnp.arange(substeps, dtype=y0.dtype)[:, None]
        guess = jnp.broadcast_to(y0, (substeps, y0.size))
        ys = elk_alg(step, y0, guess, t0s, num_iters=iterations, deer=True)
        return ys[-1, -1:]

    return solve
