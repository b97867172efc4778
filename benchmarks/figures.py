"""Draws the pictures of the documentation that no benchmark draws.

python -m benchmarks.figures
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from diffrax import ODETerm, Tsit5
from diffrax_deer import ConstantGuess, DeerSolver

from .table import RESULTS


FIGURES = Path(__file__).parent.parent / "docs" / "figures"
GREY, TEAL, ORANGE = "0.75", "#00796b", "#e65100"
PANELS = (0, 1, 2, 4, 8, 12, 16, 24)


def convergence():
    """All substeps of a trajectory, iteration by iteration."""

    def van_der_pol(t, y, args):
        return jnp.stack([y[1], 2 * (1 - y[0] ** 2) * y[1] - y[0]])

    ts, y0 = jnp.linspace(0, 10, 129), jnp.array([2.0, 0.0])
    solver = DeerSolver(Tsit5(), 128, guess=ConstantGuess())
    term = ODETerm(van_der_pol)
    problem = solver.problem(term, ts[:-1], ts[1:], y0, None, reads=(True,))
    iteration = solver.iteration(problem)
    state = iteration.init(solver.first_guess(problem, None)[0])
    step = jax.jit(lambda state: iteration.step(state))
    iterates = [state.at.ys]
    while iteration.goes_on(state):
        state = step(state)
        iterates.append(state.at.ys)
    panels = [*(k for k in PANELS if k < len(iterates) - 1)][:7] + [len(iterates) - 1]
    figure, axes = plt.subplots(
        2, 4, figsize=(10, 4.2), sharex=True, sharey=True, layout="constrained"
    )
    for ax, k in zip(axes.flat, panels):
        ax.plot(ts[1:], iterates[-1][:, 0], color=GREY, linewidth=3)
        ax.plot(ts[1:], iterates[k][:, 0], ".", color=TEAL, markersize=3)
        ax.set_title("guess" if k == 0 else f"iteration {k}", fontsize=10)
        ax.set_ylim(-4, 4)
    for ax in axes[-1]:
        ax.set_xlabel("time")
    figure.savefig(FIGURES / "convergence.png", dpi=150)


def span():
    """Sequential and joint solves, side by side."""
    rows = json.loads((RESULTS / "span_cpu.json").read_text())["rows"]
    rows = [row for row in rows if row["suite"] == "adaptive, rtol=1e-06"]
    spans = {
        name: {row["problem"]: row["span"] for row in rows if row["name"] == name}
        for name in ("Tsit5", "DeerSolver()")
    }
    problems = sorted(spans["Tsit5"], key=lambda problem: spans["Tsit5"][problem])
    y = np.arange(len(problems))
    figure, ax = plt.subplots(figsize=(8, 5.5), layout="constrained")
    ends = {name: [x[problem] for problem in problems] for name, x in spans.items()}
    ax.hlines(y, ends["DeerSolver()"], ends["Tsit5"], color=GREY, zorder=0)
    ax.scatter(ends["DeerSolver()"], y, color=TEAL, label="DeerSolver()")
    ax.scatter(ends["Tsit5"], y, color=ORANGE, label="Tsit5()")
    ax.set_yticks(y, problems)
    ax.set_xscale("log")
    ax.set_xlabel("evaluations that follow one another (rtol=1e-6)")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(FIGURES / "span.png", dpi=150)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    matplotlib.use("Agg")
    convergence()
    span()
