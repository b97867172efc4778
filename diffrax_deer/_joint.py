from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from diffrax import RESULTS
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from ._method import AbstractMethod
from ._scan import AbstractScan
from ._step import OneStepMap


# What the rounding errors made in one substep amount to, in units of its values'
# precision. A residual below this cannot be told from zero.
_ROUNDING = 16


class JointSolution(eqx.Module):
    """The values at the ends of all substeps of a window, and how they were found."""

    ys: Float[Array, "substeps size"]
    num_iterations: Int[Array, ""]
    result: RESULTS
    # The linearisation used by the last iteration.
    A: Float[Array, "substeps size size"]


class _State(eqx.Module):
    ys: Float[Array, "substeps size"]
    A: Float[Array, "substeps size size"]
    num_iterations: Int[Array, ""]
    change: Float[Array, ""]
    converged: Bool[Array, ""]
    stuck: Bool[Array, ""]


def joint_solve(
    step: OneStepMap,
    y0: Float[Array, " size"],
    guess: Float[Array, "substeps size"],
    *,
    method: AbstractMethod,
    scan: AbstractScan,
    rtol: float,
    atol: float,
    norm: Callable[[PyTree], Scalar],
    max_iters: int,
) -> JointSolution:
    r"""Solves $y_{n+1} = \Phi_n(y_n)$ for all $n$ jointly.

    `ys` can be differentiated with respect to `y0` and all that `step` closes over, in
    forward and in reverse mode and more than once. Its derivative is that of the
    equation solved: it depends neither on the guess nor on the method.
    """

    def starts(ys):
        return jnp.concatenate([y0[None], ys[:-1]])

    def residual(ys):
        return ys - step(starts(ys))

    def iterate():
        return _iterate(
            step, y0, starts, guess, method, scan, rtol, atol, norm, max_iters
        )

    def tangent_solve(residual_jvp, b):
        # `residual_jvp(x)[n] = x[n] - A[n] @ x[n - 1]`, which we can take apart by
        # moving all substeps along the same unit vector.
        def column(unit):
            x = jnp.broadcast_to(unit, b.shape)
            return x - residual_jvp(x)

        A = jax.vmap(column, out_axes=-1)(jnp.eye(b.shape[-1], dtype=b.dtype))
        A_T = jnp.swapaxes(A, -1, -2)
        A_T = jnp.concatenate([A_T[1:], jnp.zeros_like(A_T[:1])])
        return lax.custom_linear_solve(
            residual_jvp,
            b,
            solve=lambda _, b: scan(A, b),
            transpose_solve=lambda _, b: scan(A_T, b, reverse=True),
        )

    solution = without_gradient(iterate)
    okay = solution.result == RESULTS.successful
    ys = lax.custom_root(residual, solution.ys, lambda _, ys: ys, tangent_solve)
    return eqx.tree_at(lambda s: s.ys, solution, ys)


def without_gradient(fn: Callable[[], PyTree]) -> PyTree:
    """Calls `fn`, which JAX will not try to differentiate."""
    # So hoist everything that it closes over, at which to stop the gradient.
    fn = eqx.filter_closure_convert(fn)
    dynamic, static = eqx.partition(fn, eqx.is_array)
    return eqx.combine(lax.stop_gradient(dynamic), static)()


def _iterate(step, y0, starts, guess, method, scan, rtol, atol, norm, max_iters):
    eps = float(jnp.finfo(guess.dtype).eps)

    def cond_fun(state):
        return (
            ~state.converged & ~state.stuck & (state.num_iterations < max_iters)
        )

    def body_fun(state):
        ys = state.ys
        new_ys = step(starts(ys))
        r = new_ys - ys
        A = method.linearise(step, y0, ys)

        # Far from the solution, vector fields may overflow or leave their domain. Those
        # substeps are left as they are, and wait for better values to arrive.
        ok = jnp.isfinite(new_ys).all(axis=-1) & jnp.isfinite(A).all(axis=(-1, -2))
        A = jnp.where(ok[:, None, None], A, 0)
        r = jnp.where(ok[:, None], r, 0)
        delta = scan(A, r)
        ok = ok & jnp.isfinite(delta).all(axis=-1)
        # Up to the front of those substeps whose initial value is final already,
        # `delta == r` and the new values are those of the substep, to the last bit. The
        # front moves by one substep or more in every iteration.
        new_ys = jnp.where(ok[:, None], new_ys + (delta - r), ys)
        delta = new_ys - ys

        scale = jnp.maximum(jnp.abs(ys), jnp.abs(new_ys))
        change = norm(delta / (atol + rtol * scale))
        small_change = change < 1
        # With many or unstable substeps, rounding errors add up to more than the
        # tolerance. Then we are done as soon as another iteration does not help.
        largest = jnp.max(scale, axis=-1, keepdims=True)
        rounding = jnp.all(jnp.abs(r) <= _ROUNDING * eps * largest)
        stagnates = rounding & (change > 0.5 * state.change)
        all_ok = jnp.all(ok)
        return _State(
            ys=new_ys,
            A=A,
            num_iterations=state.num_iterations + 1,
            change=change,
            converged=all_ok & (small_change | stagnates),
            stuck=~all_ok & jnp.all(delta == 0),
        )

    size = guess.shape[-1]
    state = _State(
        ys=guess,
        A=jnp.zeros((*guess.shape, size), guess.dtype),
        num_iterations=jnp.array(0),
        change=jnp.array(jnp.inf, guess.dtype),
        converged=jnp.array(size == 0),
        stuck=jnp.array(False),
    )
    state = lax.while_loop(cond_fun, body_fun, state)
    result = RESULTS.where(
        state.converged,
        RESULTS.successful,
        RESULTS.where(
            state.stuck, RESULTS.nonfinite, RESULTS.nonlinear_max_steps_reached
        ),
    )
    return JointSolution(state.ys, state.num_iterations, result, state.A)
