from collections.abc import Callable

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from diffrax import RESULTS
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._custom_types import RealScalarLike
from ._implicit import implicit_trajectory, is_preconditioner, without_gradient
from ._method import AbstractMethod
from ._scan import AbstractScan, Matrices
from ._window import AbstractWindow, is_finite, up_to_front


# What the rounding errors made in one substep amount to, in units of its values'
# precision. A residual below this cannot be told from zero.
_ROUNDING = 16
# The best rate of convergence that is believed.
_MIN_RATE = 1e-3
# The fraction of the tolerance that the estimated distance to the solution must reach.
_SAFETY = 0.1
# Residuals that shrink by less than this do not speak for the linearisation.
_SHRINKS = 0.1


class JointSolution(eqx.Module):
    """The values at the ends of all substeps of a window, and how they were found."""

    ys: Float[Array, "substeps size"]
    num_iterations: Int[Array, ""]
    result: RESULTS
    # The last linearisation that was made.
    A: Matrices


class State(eqx.Module):
    """Where an iteration stands."""

    ys: Float[Array, "substeps size"]
    A: Matrices
    num_iterations: Int[Array, ""]
    # In units of the tolerance.
    residual: Float[Array, ""]
    change: Float[Array, ""]
    finite: Bool[Array, ""]
    converged: Bool[Array, ""]
    stuck: Bool[Array, ""]


class Iteration(eqx.Module):
    """A fixed-point iteration for all substeps of a window."""

    window: AbstractWindow
    method: AbstractMethod
    scan: AbstractScan
    rtol: RealScalarLike | None
    atol: RealScalarLike | None
    norm: Callable[[PyTree], RealScalarLike]
    max_iters: int
    # After how many iterations to give up if values are not finite.
    patience: int | None = None

    def run(self, guess: Float[Array, "substeps size"]) -> JointSolution:
        """If the result is not successful, then `ys` are the values that this ended
        with. These are finite if those of the guess are."""
        # JAX would hash bound methods, and with them what this has for fields.
        goes_on, step = (
            lambda state: self.goes_on(state),
            lambda state: self.step(state),
        )
        state = lax.while_loop(goes_on, step, self.init(guess))
        result = RESULTS.promote(
            optx.RESULTS.where(
                state.finite,
                optx.RESULTS.nonlinear_max_steps_reached,
                optx.RESULTS.nonfinite,
            )
        )
        result = RESULTS.where(state.converged, RESULTS.successful, result)
        return JointSolution(state.ys, state.num_iterations, result, state.A)

    def init(self, guess: Float[Array, "substeps size"]) -> State:
        A = jax.eval_shape(lambda: self.method.linearise(self.window, guess))
        return State(
            ys=guess,
            A=jnp.zeros(A.shape, A.dtype),
            num_iterations=jnp.array(0, jnp.int32),
            residual=jnp.array(-jnp.inf, guess.dtype),
            # No rate is known yet.
            change=jnp.array(0, guess.dtype),
            finite=jnp.array(True),
            # The trivial state has nothing to iterate on.
            converged=jnp.array(guess.shape[1] == 0),
            stuck=jnp.array(False),
        )

    def goes_on(self, state: State) -> Bool[Array, ""]:
        n = state.num_iterations
        goes_on = jnp.invert(state.converged | state.stuck) & (n < self.max_iters)
        if self.patience is None:
            return goes_on
        else:
            return goes_on & (state.finite | (n < self.patience))

    def step(self, state: State) -> State:
        window, ys = self.window, state.ys
        substeps = ys.shape[0]
        starts = window.starts(ys)
        # XLA must not evaluate this twice, and round differently where it is fused with
        # something else: residuals that are zero would not be.
        stepped_ys = lax.optimization_barrier(window.ends(starts))

        # Far from the solution, vector fields may overflow or leave their domain.
        exists = okay = is_finite(stepped_ys)
        r = jnp.where(okay[:, None], stepped_ys - ys, 0)
        residual = self.norm(r / self.tolerance(jnp.abs(ys) + jnp.abs(r)))
        residual = jnp.asarray(residual, state.residual.dtype)
        # If the residuals shrink by the same factor once more, they will be below the
        # tolerance. Then the linearisation need not be any better.
        suffices = (
            jnp.all(okay)
            & jnp.isfinite(state.residual)
            & (residual <= _SHRINKS * state.residual)
            & (residual * residual <= state.residual)
        )
        outdated = jnp.invert(suffices) & self.goes_on(state)
        # In a batch, all or none: a `cond` that differs between elements is no saving.
        A = lax.cond(
            eqxi.unvmap_any(outdated),
            lambda: self.linearise(ys, okay),
            lambda: state.A,
        )
        delta, is_telling = self.method.correct(self.scan, A, r, ys)
        # This changes nothing, unless the scan makes rounding errors larger than ours.
        is_known = up_to_front(jnp.any(r != 0, axis=-1) | jnp.invert(exists))
        delta = jnp.where(is_known[:, None], r, delta)
        # This sum is arranged such that, up to the front of those substeps that start
        # from a final value, `delta == r` gives the wrapped solver's step to the last
        # bit. The front moves by at least one substep in every iteration.
        new_ys = stepped_ys + (delta - r)
        okay = okay & is_finite(new_ys)
        # Where no step arrives, or none departs from, begin again with the last value
        # that is of use. (If left as they are, these would come back one by one.)
        departs = jnp.concatenate([exists[1:], jnp.array([True])])
        is_lost = jnp.invert(is_known | (okay & departs))
        new_ys = jnp.where(okay[:, None], new_ys, ys)
        last = new_ys[jnp.argmax(is_lost).astype(jnp.int32) - 1]
        new_ys = jnp.where(is_lost[:, None], last, new_ys)

        delta = new_ys - ys
        scale = jnp.maximum(jnp.abs(ys), jnp.abs(new_ys))
        change = self.norm(delta / self.tolerance(scale))
        change = jnp.asarray(change, state.change.dtype)
        # The distance to the solution that is left, if the changes go on shrinking at
        # this rate. It takes two iterations to know the rate. That is well spent: the
        # linearisation may be far from that of the wrapped solver, for example if the
        # latter is unstable, and then a small change does not mean that we are close.
        # Nor do we believe in a very good rate: parts of the solution that converge
        # slowly may hide behind others, as long as these are further away.
        rate = jnp.maximum(change / state.change, _MIN_RATE)
        left = jnp.where(rate < 0.5, change * rate / (1 - rate), jnp.inf)
        converged = ((left < _SAFETY) & is_telling) | (change == 0)
        # Over many substeps, rounding errors may add up to more than the tolerance.
        # Then we are done once another iteration does not help. Those made in a substep
        # are proportional to the values that it starts from and ends at. (To no more
        # than them: a large `A` must not excuse large residuals far from the solution.)
        weights = jnp.minimum(jnp.abs(A), 1)
        if A.ndim == ys.ndim:
            carried = weights * jnp.abs(starts)
        else:
            carried = jnp.sum(weights * jnp.abs(starts)[:, None, :], axis=-1)
        size = jnp.abs(ys) + carried
        rounding_error = _ROUNDING * window.eps * size
        finite = jnp.all(okay)
        standstill = finite & (rate >= 0.5) & (state.num_iterations > 0)
        noise = window.noise(starts, r, standstill)
        stagnates = standstill & jnp.all(jnp.abs(r) <= rounding_error + noise)
        # It may even make it worse, as a large `A` amplifies rounding errors.
        new_ys = jnp.where(stagnates, ys, new_ys)
        num_iterations = state.num_iterations + 1
        complete = num_iterations == substeps
        return State(
            ys=new_ys,
            A=A,
            num_iterations=num_iterations,
            residual=residual,
            change=change,
            finite=finite,
            converged=finite & (converged | stagnates | complete),
            stuck=jnp.invert(finite) & jnp.all(delta == 0),
        )

    def linearise(
        self, ys: Float[Array, "substeps size"], okay: Bool[Array, " substeps"]
    ) -> Matrices:
        A = self.method.linearise(self.window, ys)
        A_finite = jnp.isfinite(A.reshape(len(ys), -1)).all(axis=-1)
        usable = (okay & A_finite).reshape(-1, *[1] * (A.ndim - 1))
        return jnp.where(usable, A, 0)

    def tolerance(
        self, scale: Float[Array, "substeps size"]
    ) -> Float[Array, "substeps size"]:
        """How far values of this size may be from the solution."""
        rtol, atol, eps = self.rtol, self.atol, self.window.eps
        if rtol is None:
            rtol = 1e-10 if eps < 1e-12 else 40 * eps
        if atol is None:
            # Small compared with `rtol`, also if the solution itself is small.
            magnitude = jnp.minimum(1, jnp.max(scale, initial=0))
            atol = jnp.maximum(1e-2 * rtol * magnitude, jnp.finfo(scale.dtype).tiny)
        return jnp.asarray(atol + rtol * scale)


def joint_solve(
    iteration: Iteration, guess: Callable[[], Float[Array, "substeps size"]]
) -> JointSolution:
    r"""Solves $y_{n+1} = \Phi_n(y_n)$ for all $n$ jointly.

    `ys` can be differentiated with respect to `window.y0` and all that `window` closes
    over, in forward and in reverse mode and more than once. Its derivative is that of
    the equation solved: it depends neither on the guess nor on the method.

    If the result is not successful, then `ys` is `window.y0` throughout.
    """
    window = iteration.window
    solution = without_gradient(lambda: iteration.run(guess()), is_loop=True)
    okay = solution.result == RESULTS.successful
    # A window that failed is masked out by the step size controller, at the end. That
    # is not enough, as the zero cotangents that it gets would still be multiplied with
    # derivatives that may have overflowed.
    ys = jnp.where(okay, solution.ys, lax.stop_gradient(window.y0))

    def step(x, y0):
        y1 = jnp.where(okay, window.substep(x, y0), lax.stop_gradient(y0))
        return y1, None

    if is_preconditioner(solution.A, window):
        preconditioner = jnp.where(okay, solution.A, 0)
    else:
        preconditioner = None
    xs = window.inputs
    x0 = jtu.tree_map(lambda x: x[0], xs)
    step = eqx.filter_closure_convert(step, x0, window.y0)
    ys, _ = implicit_trajectory(
        *(ys, None, step, xs, window.y0),
        scan=iteration.scan,
        preconditioner=preconditioner,
        chunk_size=ys.shape[0],
        num_chunks=1,
    )
    return eqx.tree_at(lambda s: s.ys, solution, ys)
