"""Every solver of Diffrax, and our own, wrapped: values and derivatives.

The table in `docs/solvers.md` is made of this: `python -m tests.test_all_solvers`.
"""

import functools as ft
import re
from pathlib import Path
from typing import Any

import diffrax
import diffrax_deer
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
import pytest
from diffrax import ControlTerm, MultiTerm, ODETerm
from diffrax_deer import ConstantGuess, DeerSolver
from diffrax_deer._window import Scheme

from .helpers import (
    max_error,
    problem,
    root_finder,
    split_problem,
    weighted_sum,
)


PAGE = Path(__file__).parent.parent / "docs" / "solvers.md"
STEPS = 2
# Whose noise must not depend on the state.
ADDITIVE = ("ShARK", "SRA1", "SEA")
# ... and those whose noise must be diagonal, or such that the order does not matter.
DIAGONAL = ("SPaRK", "GeneralShARK", "SlowRK", "ItoMilstein", "StratonovichMilstein")


class _Motion(diffrax.AbstractBrownianPath):
    """Not really Brownian, but solvers cannot know. (Trees, which are slow to
    compile, are in `test_stochastic.py`.)"""

    strength: Any
    levy_area: Any = eqx.field(default=diffrax.SpaceTimeTimeLevyArea, static=True)
    t0: float = 0.0
    t1: float = 1.0

    def evaluate(self, t0: Any, t1: Any = None, left=True, use_levy=False) -> Any:
        def increment(frequency):
            scale = jnp.array([0.3, 0.5]) * self.strength
            return scale * (jnp.sin(frequency * t1) - jnp.sin(frequency * t0))

        dt, (W, H, K) = t1 - t0, map(increment, (7.0, 9.0, 11.0))
        return self.levy_area(dt=dt, W=W, H=H, K=K) if use_levy else W


# Type checkers miss that its fields are arguments.
Motion: Any = _Motion


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
    has_finder = "root_finder" in cls.__dataclass_fields__
    return cls(root_finder=root_finder) if has_finder else cls()


def equation(name: str) -> tuple[str, Any, Any, Any]:
    """What the solver is given. A name, the terms as a function of how strong the noise
    is, the initial value, and parameters."""
    term, y0, args = problem()

    drift = ODETerm(lambda t, y, args: -args * jnp.sin(y) * jnp.cos(t))
    pair = jnp.array([1.0, -0.4])

    def noise(field):
        return lambda strength: MultiTerm(drift, ControlTerm(field, Motion(strength)))

    if name in ("ALIGN", "QUICSORT", "ShOULD"):

        def langevin(strength):
            return MultiTerm(
                diffrax.UnderdampedLangevinDriftTerm(
                    0.7, 1.3, lambda x, args: args * jnp.sin(x)
                ),
                diffrax.UnderdampedLangevinDiffusionTerm(0.7, 1.3, Motion(strength)),
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
        terms, y0, args = split_problem()
        return "pair of ODEs", lambda _: terms, y0, args
    elif name in ("KenCarp3", "KenCarp4", "KenCarp5", "Sil3"):
        other = ODETerm(lambda t, y, args: -2 * args * y)
        return "sum of ODEs", lambda _: MultiTerm(term, other), y0, args
    return "ODE", lambda _: term, y0, args


def refusal(solver: Any) -> str | None:
    """Why it cannot be wrapped."""
    try:
        DeerSolver(solver)
    except ValueError as error:
        [reason] = re.findall(r"Its (step .*? on a grid)", str(error))
        return f"its {reason}"
    return None


def row(name: str) -> list[str]:
    """What the table says about it."""
    solver = make(name)
    reason = refusal(solver)
    if reason is not None:
        return [f"`{name}`", f"refused: {reason}", "", "", "", ""]
    kind, terms, y0, args = equation(name)
    terms = terms(jnp.array(1.0))
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
@pytest.mark.parametrize("name", [x for x in CLASSES if refusal(make(x)) is None])
def test_as_sequential(name):
    """On the same grid, in a batch of initial values, parameters and paths."""
    solver = make(name)
    _, terms, y0, args = equation(name)

    def solve(solver, steps, y0, args, strength):
        # Without Diffrax's loop, which is the same for all of them.
        def step(carry, times):
            (t0, t1), (y, state) = times, carry
            y, _, _, state, _ = solver.step(
                *(terms(strength), t0, t1, y, args, state), made_jump=False
            )
            return (y, state), None

        ts = jnp.linspace(0, 1, steps + 1)
        state = solver.init(terms(strength), ts[0], ts[1], y0, args)
        (y, _), _ = lax.scan(step, (y0, state), (ts[:-1], ts[1:]))
        return sum(map(weighted_sum, jax.tree.leaves(y)))

    wrapped = DeerSolver(solver, STEPS, guess=ConstantGuess())
    joint = ft.partial(solve, wrapped, 1)
    batch = lambda x: jnp.stack([x, 0.7 * x])
    inputs = (*jax.tree.map(batch, (y0, args)), jnp.array([1.0, -0.6]))
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(joint, (0, 1, 2))))(*inputs)

    # Finite differences, so that nothing else has to be differentiated.
    directions = jax.tree.map(lambda x: jnp.cos(1 + jnp.arange(x.size)), inputs)
    directions = jax.tree.map(lambda x, d: d.reshape(x.shape), inputs, directions)
    sequential = jax.vmap(ft.partial(solve, solver, STEPS))
    at = lambda step: jax.tree.map(lambda x, d: x + step * d, inputs, directions)
    expected, above, below = jax.jit(lambda *at: lax.map(lambda x: sequential(*x), at))(
        *jax.tree.map(lambda *x: jnp.stack(x), at(0.0), at(1e-5), at(-1e-5))
    )
    assert max_error(values, expected) < 1e-9
    along = jax.tree.map(
        lambda g, d: jnp.sum((g * d).reshape(2, -1), axis=1), gradients, directions
    )
    assert max_error(sum(jax.tree.leaves(along)), (above - below) / 2e-5) < 1e-6


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    PAGE.write_text(updated(PAGE.read_text()))
