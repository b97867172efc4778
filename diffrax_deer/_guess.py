import abc
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractSolver, AbstractTerm
from jaxtyping import Array, PyTree, Real

from ._checks import check_one_step_solver, check_positive_int
from ._step import OneStepMap


class AbstractGuess(eqx.Module):
    """Abstract base class for all first guesses of the trajectory over a window."""

    @abc.abstractmethod
    def __call__(
        self,
        solver: AbstractSolver,
        terms: PyTree[AbstractTerm],
        ts: Real[Array, " substeps_plus_1"],
        y0: PyTree[Array],
        args: PyTree[Any],
    ) -> PyTree[Array]:
        """Guess the values at the ends of all substeps.

        **Arguments:**

        - `solver`: the solver that [`diffrax_deer.DeerSolver`][] wraps.
        - `terms`, `args`: as in `diffrax.diffeqsolve`.
        - `ts`: the times at which the substeps begin and end.
        - `y0`: the value at `ts[0]`.

        **Returns:**

        The values at `ts[1:]`: a PyTree like `y0` with a leading axis on every leaf.
        Values that are not finite are replaced by `y0`.
        """


class ConstantGuess(AbstractGuess):
    """Guesses that the solution does not change over the window.

    This takes no time at all. It suits windows over which the solution changes little.
    """

    def __call__(
        self,
        solver: AbstractSolver,
        terms: PyTree[AbstractTerm],
        ts: Real[Array, " substeps_plus_1"],
        y0: PyTree[Array],
        args: PyTree[Any],
    ) -> PyTree[Array]:
        del solver, terms, args
        substeps = ts.shape[0] - 1
        return jtu.tree_map(lambda y: jnp.broadcast_to(y, (substeps, *y.shape)), y0)


ConstantGuess.__init__.__doc__ = """**Arguments:** None"""


class CoarseGuess(AbstractGuess):
    """Makes a few large steps one after the other, and interpolates between them.

    Then few iterations are needed also over windows that are long enough for the
    solution to oscillate, or to pass several time scales. Where such large steps are
    unstable (the problem is stiff and the solver explicit), this falls back to the
    constant guess.
    """

    solver: AbstractSolver | None = None
    steps: int | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        if self.solver is not None:
            check_one_step_solver(self.solver, "CoarseGuess(solver=...)")
        if self.steps is not None:
            check_positive_int(self.steps, "CoarseGuess(steps=...)")

    def __call__(
        self,
        solver: AbstractSolver,
        terms: PyTree[AbstractTerm],
        ts: Real[Array, " substeps_plus_1"],
        y0: PyTree[Array],
        args: PyTree[Any],
    ) -> PyTree[Array]:
        substeps = ts.shape[0] - 1
        if self.steps is None:
            # Measured, see `benchmarks/NOTES.md`.
            steps = min(max(substeps // 4, 1), 32)
        else:
            steps = min(self.steps, substeps)
        # Substeps of length zero, with which a window may be padded, do not count.
        used = jnp.maximum(jnp.searchsorted(ts, ts[-1]), 1)
        coarse_ts = ts[jnp.arange(steps + 1, dtype=jnp.int32) * used // steps]
        coarse_solver = solver if self.solver is None else self.solver
        step = OneStepMap(coarse_solver, terms, y0, args)

        def body(y, t0__t1):
            out = step.substep(*t0__t1, y)
            return out.y1, out.dense_info

        _, dense_infos = lax.scan(body, y0, (coarse_ts[:-1], coarse_ts[1:]))

        def interpolate(n, t):
            # The large step that the `n`-th substep is a part of.
            i = jnp.minimum(-(n * steps // -used), steps) - 1
            dense_info = jtu.tree_map(lambda x: x[i], dense_infos)
            return coarse_solver.interpolation_cls(
                t0=coarse_ts[i], t1=coarse_ts[i + 1], **dense_info
            ).evaluate(t)

        index = jnp.arange(1, substeps + 1, dtype=jnp.int32)
        coarse = jax.vmap(interpolate)(index, ts[1:])
        vector_field = step.vector_field
        if vector_field is None:
            return coarse

        # Of both guesses, take that which satisfies the differential equation better.
        constant = ConstantGuess()(solver, terms, ts, y0, args)

        def defect(ys):
            ys = jax.vmap(step.ravel, axis_size=substeps)(ys)
            ys = jnp.concatenate([step.ravel(y0)[None], ys])
            fs = jax.vmap(vector_field)(ts, ys)
            trapezoid = 0.5 * jnp.diff(ts)[:, None] * (fs[1:] + fs[:-1])
            size = jnp.max(jnp.abs(jnp.diff(ys, axis=0) - trapezoid), initial=0)
            return jnp.where(jnp.isfinite(size), size, jnp.inf)

        guesses = jtu.tree_map(lambda *ys: jnp.stack(ys), coarse, constant)
        best = jnp.argmin(jax.vmap(defect, axis_size=2)(guesses))
        return jtu.tree_map(lambda ys: ys[best], guesses)


CoarseGuess.__init__.__doc__ = """**Arguments:**

- `solver`: the solver that makes these steps. Defaults to the solver that
    [`diffrax_deer.DeerSolver`][] wraps.
- `steps`: how many steps to make. (At most `substeps`.) Defaults to a quarter of
    `substeps`, but at most 32.
"""
