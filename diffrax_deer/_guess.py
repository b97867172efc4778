import abc
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractSolver, AbstractTerm
from jaxtyping import Array, Float, PyTree

from ._interpolation import uniform_grid, WindowInterpolation
from ._step import OneStepMap


class AbstractGuess(eqx.Module):
    """Abstract base class for all first guesses of the trajectory over a window."""

    @abc.abstractmethod
    def __call__(
        self,
        solver: AbstractSolver,
        terms: PyTree[AbstractTerm],
        ts: Float[Array, " substeps+1"],
        y0: PyTree[Array],
        args: PyTree[Any],
    ) -> PyTree[Array]:
        """Guess the values at the ends of all substeps.

        **Arguments:**

        - `solver`: the solver that [`diffrax_deer.DeerSolver`][] wraps.
        - `terms`, `args`: as in [`diffrax.diffeqsolve`][].
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
        ts: Float[Array, " substeps+1"],
        y0: PyTree[Array],
        args: PyTree[Any],
    ) -> PyTree[Array]:
        del solver, terms, args
        substeps = ts.shape[0] - 1
        return jtu.tree_map(lambda y: jnp.broadcast_to(y, (substeps, *y.shape)), y0)


ConstantGuess.__init__.__doc__ = """**Arguments:** None"""


class CoarseGuess(AbstractGuess):
    """Makes a few large steps one after the other, and interpolates between them.

    This takes few iterations, also over windows which are long enough for the solution
    to oscillate, or to pass several time scales.
    """

    solver: AbstractSolver | None = None
    steps: int = eqx.field(default=16, static=True)

    def __check_init__(self):
        if self.solver is not None and not isinstance(self.solver, AbstractSolver):
            raise TypeError(
                "`CoarseGuess(solver=...)` must be a Diffrax solver or `None`, got "
                f"{self.solver!r}."
            )
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(
                "`CoarseGuess(steps=...)` must be an integer of at least 1, got "
                f"{self.steps!r}."
            )

    def __call__(
        self,
        solver: AbstractSolver,
        terms: PyTree[AbstractTerm],
        ts: Float[Array, " substeps+1"],
        y0: PyTree[Array],
        args: PyTree[Any],
    ) -> PyTree[Array]:
        if self.solver is not None:
            solver = self.solver
        steps = min(self.steps, ts.shape[0] - 1)
        coarse_ts = uniform_grid(ts[0], ts[-1], steps)
        step = OneStepMap(solver, terms, coarse_ts, y0, args)

        def body(y, t0_t1):
            out = step.substep(*t0_t1, y)
            return out.y1, out.dense_info

        _, dense_infos = lax.scan(body, y0, (coarse_ts[:-1], coarse_ts[1:]))
        interpolation = WindowInterpolation(
            t0=ts[0],
            t1=ts[-1],
            dense_infos=dense_infos,
            substeps=steps,
            interpolation_cls=solver.interpolation_cls,
        )
        return jax.vmap(interpolation.evaluate)(ts[1:])


CoarseGuess.__init__.__doc__ = """**Arguments:**

- `solver`: the solver that makes these steps. Defaults to the wrapped solver.
- `steps`: how many steps to make.
"""
