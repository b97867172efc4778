"""The derivative of the solution of a window, by the implicit function theorem."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from diffrax import RESULTS
from jaxtyping import Array

from .._custom_types import PyTree
from .._iterate import Iteration, JointSolution
from .._method import AbstractMethod
from .._scan import AbstractScan
from .._tangents import with_zeros
from .._time_axis import last, with_last
from .._window import AbstractWindow, Iterate
from .linear import differentiates_in_turn, linear_solve, share_read


_T = TypeVar("_T")


# This could be `jax.lax.custom_root`, which however traces the derivatives also if they
# are not needed.
@eqx.filter_custom_jvp
def implicit_solution(
    at: Iterate, window: AbstractWindow, *, method: AbstractMethod, scan: AbstractScan
) -> Iterate:
    """The solution of a window, as a function of all that the window consists of. It
    must be known already.

    Its derivative solves the linearised equations, and the transpose of that goes
    backwards in time.
    """
    del window, method, scan
    return at


@implicit_solution.def_jvp
def _(primals, tangents, *, method, scan):
    at, window = primals
    _, t_window = tangents
    # For higher derivatives: the rule below also depends on the solution.
    at = implicit_solution(at, window, method=method, scan=scan)
    # The value at the start is dealt with by the solve.
    t_start = with_zeros(t_window.y0, window.y0)
    t_window = eqx.tree_at(lambda w: w.y0, t_window, None, is_leaf=_is_none)
    one_by_one = differentiates_in_turn(window.is_explicit, window.sharding)
    if one_by_one and 1 <= share_read(window, t_window) < math.inf:
        # An evaluation for each substep serves all of its derivatives.
        return at, window.derivative(at, t_window, t_start, None)
    # Otherwise `b` takes another one, but of all substeps at once. Its transpose then
    # also adds up once what else, of a long table, would be added up in each substep.
    targets = lambda window: window.all_targets(at)
    _, b = eqx.filter_jvp(targets, (window,), (t_window,))
    return at, linear_solve(window, at, method, scan)(t_start, with_zeros(b, at))


@jax.custom_jvp
def as_known(known: PyTree[Array], y: PyTree[Array]) -> PyTree[Array]:
    """`y`, if its value is known already. What it takes to find `y` then only serves
    to differentiate it, and otherwise is dead code."""
    del y
    return known


@as_known.defjvp
def _(primals, tangents):
    _, t_y = tangents
    return as_known(*primals), t_y


def _is_none(x):
    return x is None


def without_gradient(fn: Callable[[], _T]) -> _T:
    """`fn()`, as a constant."""
    # Hoist everything that `fn` closes over, and stop the gradient there. Otherwise JAX
    # would differentiate the operations of the iteration, or complain that it cannot.
    converted: Any = eqx.filter_closure_convert(fn)
    dynamic, static = eqx.partition(converted, eqx.is_array)
    return eqx.combine(lax.stop_gradient(dynamic), static)()


def with_derivative(solution: JointSolution, iteration: Iteration) -> JointSolution:
    """The solution of a window, as a function of all that the window consists of.

    It can be differentiated in forward and in reverse mode and more than once. Its
    derivative is that of the equations solved: it depends neither on the guess nor on
    the method.

    If the result is not successful, then `ys` is `window.y0` throughout.
    """
    window = iteration.window
    okay = solution.result == RESULTS.successful
    # A window that failed is masked out by the step size controller, at the end. But
    # the zero cotangents that it gets are still multiplied with derivatives, which far
    # from the solution might overflow.
    ys, sharding = solution.at.ys, window.sharding
    y1 = jnp.where(okay, last(ys, sharding), window.y0)
    ys = with_last(jnp.where(okay, ys, window.y0[None]), y1, sharding)
    at = Iterate(ys, jnp.where(okay, solution.at.ks, 0))
    at = implicit_solution(at, window, method=iteration.method, scan=iteration.scan)
    return eqx.tree_at(lambda s: s.at, solution, at)
