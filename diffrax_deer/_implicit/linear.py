"""The linearised equations of a window, as linear operators.

Each of the functions here returns a linear function `solve(start, b)`, which solves the
equations with right-hand side `b`, if `start` is the derivative of the value that the
window begins with. All of them can be transposed.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from .._linear_algebra import Matrices, matvec, transpose
from .._method import AbstractMethod, DEER
from .._scan import AbstractScan, whole_scan
from .._time_axis import after, before
from .._window import (
    AbstractElimination,
    AbstractWindow,
    is_noisy,
    Iterate,
    noise_of_linear,
)


_Solve = Callable[[Float[Array, " size"], Iterate], Iterate]

# Of less than this, it makes no difference how much is read.
_MIN_BYTES = 2**10
# A residual below this many rounding errors cannot be told from zero.
_ROUNDING = 16


def linear_solve(
    window: AbstractWindow, at: Iterate, method: AbstractMethod, scan: AbstractScan
) -> _Solve:
    """Picks the one that suits the platform and the method."""
    if differentiates_in_turn(window.is_explicit, window.sharding):
        nothing = eqx.filter(window, False)
        return lambda start, b: window.derivative(at, nothing, start, b)
    system = linearised(window, at, method)
    is_full = system.A.ndim == at.ys.ndim + 1
    # Full Jacobians may be too large to be formed. (But if it is implicit then nothing
    # says that the iteration with others converges.)
    if not is_full and not window.is_explicit:
        system, is_full = linearised(window, at, DEER()), True
    solve = direct(system, scan, window.sharding)
    return solve if is_full and system.is_exact else iterative(window, at, solve)


def linearised(
    window: AbstractWindow, at: Iterate, method: AbstractMethod
) -> AbstractElimination:
    """The equations as the `method` sees them."""
    _, jacobians = method.linearise(window, window.points(at))
    return window.eliminate(jacobians())


def differentiates_in_turn(is_explicit: bool, sharding: NamedSharding | None) -> bool:
    """Whether substeps are differentiated one after the other, as nothing is gained
    from more work at once."""
    return jax.default_backend() == "cpu" and is_explicit and sharding is None


def share_read(window: AbstractWindow, tangent: AbstractWindow) -> float:
    """How much an evaluation of the vector field reads, compared to all that it depends
    on and that has a tangent. Infinite if that is next to nothing.

    It is less than one if that is a long table, to be interpolated.
    """
    floats = jtu.tree_leaves(eqx.filter(tangent.core, eqx.is_inexact_array))
    size = sum(x.size * x.dtype.itemsize for x in floats)
    if size < _MIN_BYTES:
        return math.inf
    # A single substep. Of its stages, which are in a loop, only one is counted.
    first = lambda w: jtu.tree_map(lambda x: x[:1], w.xs)
    window = eqx.tree_at(lambda w: w.xs, window, first(window))
    arrays, rest = eqx.partition(window, eqx.is_array)

    @jax.jit
    def derivative(arrays):
        window = eqx.combine(arrays, rest)
        at = window.interpolated(window.y0[None])
        return window.derivative(at, eqx.filter(window, False), window.y0, None)

    cost: Any = derivative.lower(jax.eval_shape(lambda: arrays)).cost_analysis()
    return cost["bytes accessed"] / size


def direct(
    system: AbstractElimination, scan: AbstractScan, sharding: NamedSharding | None
) -> _Solve:
    """By one linear recurrence, as in an iteration."""
    scan = whole_scan(scan, sharding)

    def solve(start, b):
        condensed = system.condense(b)
        starts = before(jnp.zeros_like(condensed.ys), start)
        r = condensed.ys + matvec(system.A, starts)
        ys = recurrence(scan, system.A, r)
        return Iterate(ys, system.substitute(before(ys, start), condensed))

    return solve


def recurrence(
    scan: AbstractScan, A: Matrices, b: Float[Array, "substeps size"]
) -> Float[Array, "substeps size"]:
    """A scan that can be transposed."""
    return lax.custom_linear_solve(
        lambda x: x - matvec(A, before(x)),
        b,
        solve=lambda _, b: scan(A, b),
        transpose_solve=lambda _, b: scan(after(transpose(A, b)), b, reverse=True),
    )


def iterative(window: AbstractWindow, at: Iterate, roughly: _Solve) -> _Solve:
    """By products with Jacobians, preconditioned by a solve with approximations."""

    def targets(y0, at):
        return eqx.tree_at(lambda w: w.y0, window, y0).all_targets(at)

    _, jvp = jax.linearize(targets, window.y0, at)
    zero, none = jnp.zeros_like(window.y0), jtu.tree_map(jnp.zeros_like, at)
    _, unravel = ravel_pytree(at)
    flat = lambda fn: lambda x: ravel_pytree(fn(unravel(x)))[0]
    moved = flat(lambda x: jvp(zero, x))
    rough = flat(lambda b: roughly(zero, b))
    # Both are linear, and so have a transpose.
    length = ravel_pytree(at)[0]
    moved_T = lambda x: jax.linear_transpose(moved, length)(x)[0]
    rough_T = lambda b: jax.linear_transpose(rough, length)(b)[0]
    unknowns = len(at.ys) * (1 + window.stage_shape[1])

    def solve(start, b):
        b = jtu.tree_map(jnp.add, b, jvp(start, none))
        x = lax.custom_linear_solve(
            lambda x: x - moved(x),
            ravel_pytree(b)[0],
            solve=lambda _, b: refine(moved, rough, b, at.ys.shape[1], unknowns),
            transpose_solve=lambda _, b: refine(
                moved_T, rough_T, b, at.ys.shape[1], unknowns
            ),
        )
        return unravel(x)

    return solve


def refine(
    product: Callable[[Array], Array],
    solve: Callable[[Array], Array],
    b: Float[Array, " unknowns_times_size"],
    size: int,
    max_iters: int,
) -> Float[Array, " unknowns_times_size"]:
    """Solves `x = product(x) + b`, if `solve` does so roughly, given `b`.

    Every iteration makes one more unknown of an explicit window exact, to the last bit,
    so that there are at most as many iterations as unknowns. Usually there are few.
    """
    eps = float(jnp.finfo(b.dtype).eps)
    rows = lambda x: x.reshape(-1, size)
    size_of = lambda x: jnp.max(jnp.abs(rows(x)), axis=-1, keepdims=True)

    def cond_fun(carry):
        _, _, is_done, num_iterations = carry
        return jnp.invert(is_done) & (num_iterations < max_iters)

    def body_fun(carry):
        x, last_size, _, num_iterations = carry
        A_x = product(x)
        new_x = A_x + b
        r = jnp.where(jnp.isfinite(new_x), new_x - x, 0)
        largest = jnp.max(jnp.abs(r))
        error = _ROUNDING * eps * (size_of(x) + size_of(A_x) + size_of(b))
        if is_noisy(eps):
            is_standstill = largest > 0.5 * last_size
            fn = lambda x: rows(product(x.reshape(-1)))
            error = error + noise_of_linear(fn, rows(x), rows(A_x), is_standstill)
        is_done = jnp.all(jnp.abs(rows(new_x - x)) <= error)
        new_x = new_x + (solve(r) - r)
        # Beyond what is known already, this may go anywhere.
        new_x = jnp.where(jnp.isfinite(new_x), new_x, x)
        return new_x, largest, is_done, num_iterations + 1

    infinite, zero = jnp.array(jnp.inf, b.dtype), jnp.array(0, jnp.int32)
    init = (b, infinite, jnp.array(False), zero)
    x, *_ = lax.while_loop(cond_fun, body_fun, init)
    return x
