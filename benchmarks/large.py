"""States of hundreds of numbers, in one window of 128 substeps from a constant guess,
as on a GPU: which method solves these in less evaluations that follow one another than
it takes to make one step after the other, and in how much memory. Nothing is timed.

    python -m benchmarks.large --output benchmarks/results/large.json
"""

from typing import Any

import diffrax as dfx
import diffrax_deer as deer
import jax
import jax.numpy as jnp
from tqdm import tqdm

from . import _problems as zoo, _study as study


# Beyond that, an iteration is given up.
MAX_ITERS = 128
# Of more, Jacobians are formed only to be told their size.
MAX_DENSE = 256

# And in how many windows.
METHODS: dict[str, tuple[deer.AbstractMethod, int]] = {
    "DEER": (deer.DEER(), 1),
    "QuasiDEER, 4 samples": (deer.QuasiDEER(samples=4), 1),
    "QuasiDEER, blocks of 2": (deer.QuasiDEER(samples=1, block=2), 1),
    "Picard": (deer.Picard(), 1),
    "Picard, 8 windows": (deer.Picard(), 8),
}


def problems() -> dict[str, zoo.Problem]:
    out = {
        f"neural, {size}": zoo.neural(size)._replace(substeps=128)
        for size in (256, 1024)
    }
    for coupling in (0.0, 0.1, 1.0):
        out[f"pendulums, 2 x 512, coupling {coupling:g}"] = pendulums(512, coupling)
    out["Brusselator, 2 x 1024"] = brusselator(1024)
    out |= {f"driven, {size}": zoo.driven(size, 20.0, 128) for size in (256, 1024)}
    return out


def pendulums(number: int, coupling: float) -> zoo.Problem:
    """A ring of them."""

    def vector_field(t, y, args):
        q, p = jnp.split(y, 2)
        neighbours = jnp.roll(q, 1) + jnp.roll(q, -1) - 2 * q
        return jnp.concatenate([p, coupling * neighbours - jnp.sin(q)])

    y0 = jnp.concatenate([jnp.linspace(0.1, 2.5, number), jnp.zeros(number)])
    return zoo.Problem(dfx.ODETerm(vector_field), y0, None, 10.0, 128)


def brusselator(number: int) -> zoo.Problem:
    """It reacts and diffuses on a ring, in steps that an explicit solver can make."""

    def vector_field(t, y, args):
        u, v = jnp.split(y, 2)
        diffusion = lambda x: 1.6 * (jnp.roll(x, 1) + jnp.roll(x, -1) - 2 * x)
        du = 1 + u**2 * v - 4 * u + diffusion(u)
        return jnp.concatenate([du, 3 * u - u**2 * v + diffusion(v)])

    x = jnp.linspace(0, 8 * jnp.pi, number, endpoint=False)
    y0 = jnp.concatenate([1 + 0.5 * jnp.sin(x), 3 * jnp.ones(number)])
    return zoo.Problem(dfx.ODETerm(vector_field), y0, None, 10.0, 128)


def joint(problem: zoo.Problem, method: deer.AbstractMethod, windows: int) -> zoo.Solve:
    guess = deer.ConstantGuess()
    options: Any = dict(method=method, guess=guess, max_iters=MAX_ITERS)
    return zoo.parallel(problem, windows=windows, **options)


def compiled(solve: zoo.Solve, inputs: tuple[jax.Array, Any]) -> tuple[Any, float]:
    """And how many MiB it takes beside inputs and outputs."""
    program: Any = jax.jit(solve).lower(*inputs).compile()
    return program, program.memory_analysis().temp_size_in_bytes / 2**20


def compare(name: str, problem: zoo.Problem) -> list[study.Row]:
    as_single = lambda x: x.astype(jnp.float32)
    y0, args = jax.tree_util.tree_map(as_single, problem.inputs)
    problem = problem._replace(y0=y0, args=args)
    columns: dict[str, Any] = dict(suite="large states", problem=name, size=y0.size)
    choices = dict(METHODS)
    if name.startswith(("neural", "driven")):
        # Nothing belongs together in pairs.
        del choices["QuasiDEER, blocks of 2"]
    rows = []
    if y0.size > MAX_DENSE:
        _, mib = compiled(joint(problem, *choices.pop("DEER")), problem.inputs)
        rows.append(dict(**columns, name="DEER", temp_mib=mib))
    solves = {"sequential": zoo.sequential(problem)}
    solves |= {key: joint(problem, *choice) for key, choice in choices.items()}
    true = jax.jit(zoo.reference(problem))(*problem.inputs)
    for key, solve in tqdm(solves.items(), unit="solve", leave=False):
        program, mib = compiled(solve, problem.inputs)
        outcome = study.outcome(program(*problem.inputs), true)
        rows.append(dict(**columns, name=key, **outcome, temp_mib=mib))
    return rows


def main() -> None:
    args = study.arguments(__doc__)
    rows = []
    for name, problem in tqdm(problems().items(), unit="problem"):
        rows += compare(name, problem)
        study.save(args, rows)
    study.show(rows)


if __name__ == "__main__":
    main()
