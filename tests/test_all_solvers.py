"""Every solver of Diffrax, and our own, wrapped: values and derivatives.

The table in `docs/solvers.md` is made of this: `python -m tests.test_all_solvers`.
"""

import re
from pathlib import Path
from typing import Any

import diffrax
import diffrax_deer
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import pytest
from diffrax import ControlTerm, MultiTerm, ODETerm, VirtualBrownianTree
from diffrax_deer import ConstantGuess, DeerSolver
from diffrax_deer._window import Scheme

from .helpers import diffeqsolve, max_error, problem, root_finder, weighted_sum


PAGE = Path(__file__).parent.parent / "docs" / "solvers.md"
STEPS = 4
# Whose noise must not depend on the state.
ADDITIVE = ("ShARK", "SRA1", "SEA")
# ... and those whose noise must be diagonal, or such that the order does not matter.
DIAGONAL = ("SPaRK", "GeneralShARK", "SlowRK", "ItoMilstein", "StratonovichMilstein")
# A stage of a stage is differentiated as its solver does: up to what that leaves.
TOL = 1e-9


def solver_classes() -> dict[str, type]:
    """All that there are, also those of a later version."""

    def concrete(module):
        return {
            name: cls
            for name, cls in vars(module).items()
            if isinstance(cls, type)
            and issubclass(cls, diffrax.AbstractSolver)
            and not name.startswith("Abstract")
            and name != "DeerSolver"
        }

    return dict(sorted((concrete(diffrax) | concrete(diffrax_deer)).items()))


CLASSES = solver_classes()


def make(name: str) -> Any:
    cls: Any = CLASSES[name]
    if name == "HalfSolver":
        return cls(diffrax.Heun())
    elif name in ("GaussLegendre", "RadauIIA"):
        return cls(2)
    elif issubclass(cls, diffrax.AbstractImplicitSolver):
        return cls(root_finder=root_finder)
    return cls()


def equation(name: str, solver: Any) -> tuple[str, Any, Any, Any]:
    """What the solver is given. A name, the terms as a function of a key, the initial
    value, and parameters."""
    term, y0, args = problem()

    def path(key, shape=(2,)):
        area = getattr(solver, "minimal_levy_area", diffrax.AbstractBrownianIncrement)
        for cls in (
            diffrax.BrownianIncrement,
            diffrax.SpaceTimeLevyArea,
            diffrax.SpaceTimeTimeLevyArea,
        ):
            if issubclass(cls, area):
                return VirtualBrownianTree(0, 1, 2.0**-4, shape, key, cls)
        raise NotImplementedError(f"There is no Brownian path for {name}.")

    drift = ODETerm(lambda t, y, args: -args * jnp.sin(y) * jnp.cos(t))
    pair = jnp.array([1.0, -0.4])

    def noise(field):
        return lambda key: MultiTerm(drift, ControlTerm(field, path(key)))

    if name in ("ALIGN", "QUICSORT", "ShOULD"):

        def langevin(key):
            return MultiTerm(
                diffrax.UnderdampedLangevinDriftTerm(
                    0.7, 1.3, lambda x, args: args * jnp.sin(x)
                ),
                diffrax.UnderdampedLangevinDiffusionTerm(0.7, 1.3, path(key)),
            )

        return "underdamped Langevin", langevin, (pair, pair / 2), args
    elif name in ADDITIVE:
        field = lambda t, y, args: args * jnp.array([[0.3, 0.1], [0.2, 0.4]])
        return "SDE, additive noise", noise(field), pair, args
    elif name in DIAGONAL:
        field = lambda t, y, args: lx.DiagonalLinearOperator(args * jnp.cos(y))
        return "SDE, diagonal noise", noise(field), pair, args
    elif name == "EulerHeun":
        field = lambda t, y, args: args * jnp.outer(jnp.cos(y), jnp.array([0.3, 0.4]))
        return "SDE", noise(field), pair, args
    elif name == "SemiImplicitEuler":
        terms = (
            ODETerm(lambda t, v, args: args * v),
            ODETerm(lambda t, x, args: -jnp.sin(x) * jnp.cos(t)),
        )
        return "pair of ODEs", lambda key: terms, (pair, pair / 2), args
    elif isinstance(solver, diffrax.KenCarp3) or name in ("KenCarp4", "KenCarp5"):
        other = ODETerm(lambda t, y, args: -2 * args * y)
        return "sum of ODEs", lambda key: MultiTerm(term, other), y0, args
    elif name == "Sil3":
        other = ODETerm(lambda t, y, args: -2 * args * y)
        return "sum of ODEs", lambda key: MultiTerm(term, other), y0, args
    return "ODE", lambda key: term, y0, args


def row(name: str) -> list[str]:
    """What the table says about it."""
    solver = make(name)
    try:
        DeerSolver(solver)
    except ValueError as error:
        [reason] = re.findall(r"Its step .*? on a grid", str(error))
        return [
            f"`{name}`",
            f"refused: {reason[0].lower()}{reason[1:]}",
            "",
            "",
            "",
            "",
        ]
    kind, terms, y0, args = equation(name, solver)
    terms = terms(jr.key(0))
    scheme = Scheme(solver, terms, args, y0, (True,) * len(jax.tree.leaves(y0)))
    if scheme.tableau is None:
        unknowns, span = "ends of steps", "a step"
    else:
        unknowns, span = "stages and ends", str(scheme.span)
        if not scheme.is_explicit:
            unknowns += ", implicit"
    is_random = "SDE" in kind or "Langevin" in kind
    order = solver.strong_order(terms) if is_random else solver.order(terms)
    order = f"{order} (strong)" if is_random else str(order)
    estimates = solver.error_order(terms) is not None and has_error(solver, terms, y0)
    estimate = "yes" if estimates else "no"
    return [f"`{name}`", kind, unknowns, span, order, estimate]


def has_error(solver, terms, y0) -> bool:
    def step(t0, t1, y0, args):
        state = solver.init(terms, t0, t1, y0, args)
        return solver.step(terms, t0, t1, y0, args, state, False)[1]

    times = jnp.array(0.0), jnp.array(0.25)
    return eqx.filter_eval_shape(step, *times, y0, jnp.array(0.9)) is not None


def table() -> str:
    header = ["", "for", "unknowns", "span", "order", "error estimate"]
    lines = [header, ["---"] * len(header), *(row(name) for name in CLASSES)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def updated(text: str) -> str:
    pattern = re.compile(r"(<!-- solvers -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda m: f"{m[1]}\n{table()}\n\n{m[2]}", text)


def test_page():
    # Otherwise run `python -m tests.test_all_solvers`.
    text = PAGE.read_text()
    assert "<!-- solvers -->" in text
    assert updated(text) == text


@pytest.mark.filterwarnings("ignore:.*is not marked as converging")
@pytest.mark.parametrize("name", CLASSES)
def test_as_sequential(name):
    """On the same grid, in a batch of initial values, parameters and keys."""
    solver = make(name)
    if row(name)[1].startswith("refused"):
        return
    _, terms, y0, args = equation(name, solver)

    def solve(solver, dt0, y0, args, key):
        sol = diffeqsolve(terms(key), solver, 0.0, 1.0, dt0, y0, args, max_steps=STEPS)
        return sum(weighted_sum(y[-1]) for y in jax.tree.leaves(sol.ys)), sol.ys

    @jax.jit
    @jax.vmap
    def both(y0, args, key):
        out = []
        for each, dt0 in (
            (DeerSolver(solver, STEPS, guess=ConstantGuess()), 1.0),
            (solver, 1 / STEPS),
        ):
            fn = lambda y0, args: solve(each, dt0, y0, args, key)
            out.append(jax.value_and_grad(fn, (0, 1), has_aux=True)(y0, args))
        return out

    batch = lambda x: jnp.stack([x, 0.7 * x])
    inputs = jax.tree.map(batch, y0), batch(args), jr.split(jr.key(0), 2)
    ((_, values), gradients), ((_, ref_values), ref_gradients) = both(*inputs)
    assert max_error(values, ref_values) < TOL
    assert max_error(gradients, ref_gradients) < 1e2 * TOL
    # Neither in a batch nor compiled as a whole.
    deer = DeerSolver(solver, STEPS, guess=ConstantGuess())
    _, value = solve(deer, 1.0, *jax.tree.map(lambda x: x[0], inputs))
    assert max_error(value, jax.tree.map(lambda x: x[0], values)) < TOL


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    PAGE.write_text(updated(PAGE.read_text()))
