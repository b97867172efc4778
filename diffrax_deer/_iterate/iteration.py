import dataclasses
from collections.abc import Callable

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import RESULTS
from jaxtyping import Array, Bool, Float, Int

from .._custom_types import IntScalarLike, PyTree, RealScalarLike
from .._failure import NONFINITE, TOO_MANY_ITERATIONS
from .._linear_algebra import Matrices, matvec
from .._method import AbstractMethod
from .._scan import AbstractScan, whole_scan
from .._time_axis import after, before, first_of, running
from .._window import AbstractWindow, is_finite, is_noisy, Iterate, up_to_front
from .convergence import Convergence
from .restart import restart, too_large


# What the rounding errors made in one evaluation amount to, in units of the precision
# of its values. A residual below this cannot be told from zero. In half precision that
# would excuse far too much, so never more than a fraction of the values.
_ROUNDING = 16
_MOST_ROUNDING = 2**-8
# Implicit stages need not become exact one by one. Newton's method solves most of them
# by 2 to 4 iterations, and methods that converge linearly by up to some 30. What takes
# more than this is rarely solved by any number.
_MOST_OF_NEWTON = 32


class JointSolution(eqx.Module):
    """The solution of all substeps of a window, and how it was found."""

    at: Iterate
    num_iterations: Int[Array, ""]
    # How many evaluations of the function, or of its derivative, followed one another.
    span: Int[Array, ""]
    result: RESULTS


class State(eqx.Module):
    """Where an iteration stands."""

    at: Iterate
    convergence: Convergence
    num_iterations: Int[Array, ""]
    span: Int[Array, ""]
    # How large the terms were that the values have been summed up from, as the last
    # linearisation says.
    terms: Float[Array, "substeps parts points size"]
    # From which substep on the last iteration has begun again.
    lost: Int[Array, ""]
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
    max_iters: IntScalarLike | None

    def run(self, guess: Iterate) -> JointSolution:
        """If the result is not successful, then this is what the iteration ended with.
        It is finite if the guess is."""
        # JAX would hash bound methods, and with them what this has for fields.
        goes_on, step = (
            lambda state: self.goes_on(state),
            lambda state: self.step(state),
        )
        return self.solution(lax.while_loop(goes_on, step, self.init(guess)))

    def solution(self, state: State) -> JointSolution:
        """What it has led to, if it ends here."""
        result = RESULTS.where(state.finite, TOO_MANY_ITERATIONS, NONFINITE)
        result = RESULTS.where(state.converged, RESULTS.successful, result)
        return JointSolution(state.at, state.num_iterations, state.span, result)

    def init(self, guess: Iterate) -> State:
        window = self.window
        values = jax.eval_shape(lambda: window.values(window.points(guess)))
        zero = jnp.array(0, jnp.int32)
        return State(
            at=guess,
            convergence=Convergence(jnp.array(0, guess.ys.dtype)),
            num_iterations=zero,
            span=zero,
            terms=jnp.zeros(values.shape, values.dtype),
            lost=jnp.array(len(guess.ys), jnp.int32),
            finite=jnp.array(True),
            # The trivial state has nothing to iterate on.
            converged=jnp.array(guess.ys.shape[1] == 0),
            stuck=jnp.array(False),
        )

    def goes_on(self, state: State) -> Bool[Array, ""]:
        is_over = state.converged | state.stuck
        return jnp.invert(is_over | (state.num_iterations >= self.limit(state.at)))

    def limit(self, at: Iterate) -> IntScalarLike:
        """How many iterations there are at most."""
        if self.max_iters is not None:
            return self.max_iters
        # One unknown after the other becomes exact, at least. One more to see it.
        _, stages = self.window.stage_shape
        most = len(at.ys) * (stages + 1) + 1
        return most if self.window.is_explicit else max(most, _MOST_OF_NEWTON)

    def step(self, state: State) -> State:
        seen = self.look(state.at)
        rounding = self.rounding(seen, state.terms)
        excesses = excesses_of(seen.r, rounding)
        drifts = _drifts(self.window, seen.r, rounding)
        is_exact = state.convergence.is_exact(excesses, drifts) & seen.exists
        is_exact = jnp.all(is_exact)
        if len(excesses) == 1:
            # Of a single substep there is no drift to be seen.
            is_exact = is_exact & (state.num_iterations > 0)
        # In a batch, all or none: a `cond` that differs between elements is no saving.
        return lax.cond(
            eqxi.unvmap_all(is_exact),
            lambda: self.accept(state),
            lambda: self.correct(state, seen, rounding, excesses, is_exact),
        )

    def accept(self, state: State) -> State:
        """If there is nothing to correct."""
        return dataclasses.replace(
            state,
            num_iterations=state.num_iterations + 1,
            span=state.span + 1,
            finite=jnp.array(True),
            converged=jnp.array(True),
        )

    def correct(
        self,
        state: State,
        seen: "_Seen",
        rounding: Iterate,
        excesses: Float[Array, " substeps"],
        is_exact: Bool[Array, ""],
    ) -> State:
        window, at = self.window, state.at
        delta, is_telling, terms = self.correction(seen)
        new, usable = seen.corrected(delta)
        # Where nothing arrives, or nothing departs from. (If left as they are, these
        # would come back one by one.)
        is_lost = jnp.invert(usable & seen.exists & seen.followed)
        may_be_lost = jnp.invert(up_to_front((excesses > 1) | jnp.invert(seen.exists)))
        lost = self.lost(state, new, is_lost, may_be_lost)
        new = restart(window, new, lost)

        change = self.change(at, new)
        standstill = state.convergence.is_standstill(change) & jnp.all(seen.exists)
        if is_noisy(window.eps):
            heard = window.noise(seen.points, seen.r, standstill)
            rounding = jtu.tree_map(jnp.add, rounding, window.as_residual(heard))
            excesses = excesses_of(seen.r, rounding)
        stagnates = standstill & jnp.all(excesses <= 1)
        is_close = state.convergence.is_close(change, is_telling)
        # If damped, it may also be zero far from the solution.
        is_there = is_telling | (self.change(at, seen.targets) <= 1)
        is_close = is_close | ((change == 0) & is_there)
        # Another correction may even make it worse, as it amplifies rounding errors.
        is_solved = is_exact | stagnates
        new = jtu.tree_map(lambda x, y: jnp.where(is_solved, x, y), at, new)
        finite = jnp.all(seen.exists & usable)
        is_whole = lost == len(at.ys)
        return State(
            at=new,
            convergence=Convergence(change),
            num_iterations=state.num_iterations + 1,
            span=state.span + 1 + self.method.span(at.ys.shape[1]),
            terms=terms,
            lost=lost,
            finite=finite,
            converged=is_exact | (finite & (stagnates | (is_close & is_whole))),
            stuck=jnp.invert(finite & is_there) & (change == 0),
        )

    def look(self, at: Iterate) -> "_Seen":
        window = self.window
        points = window.points(at)
        values, jacobians = self.method.linearise(window, points)
        # Far from the solution, vector fields may overflow or leave their domain.
        okay = is_finite(values)
        values = jnp.where(okay[..., None], values, window.idle(at))
        # XLA must not evaluate this twice, and round differently where it is fused with
        # something else: residuals that are zero would not be.
        values, targets = lax.optimization_barrier((values, window.targets(at, values)))
        return _Seen(
            at=at,
            points=points,
            values=values,
            targets=targets,
            r=jtu.tree_map(jnp.subtract, targets, at),
            okay=okay,
            exists=jnp.all(okay, axis=(1, 2)) & is_finite(targets.ys),
            jacobians=jacobians,
        )

    def rounding(self, seen: "_Seen", terms: Array) -> Iterate:
        """How large residuals may be because of rounding errors."""
        ends = jnp.abs(self.window.starts(seen.at.ys)) + jnp.abs(seen.at.ys)
        # Values may be less precise than the sums that are made of them.
        of_sums = _ROUNDING * float(jnp.finfo(ends.dtype).eps)
        of_values = min(_ROUNDING * self.window.eps, _MOST_ROUNDING)
        size = jnp.abs(seen.values) + terms
        return self.window.as_residual(of_sums * ends[:, None, None] + of_values * size)

    def correction(self, seen: "_Seen") -> tuple[Iterate, Array, Array]:
        J = seen.jacobians()
        usable = seen.okay & jnp.isfinite(J).reshape(*seen.okay.shape, -1).all(axis=-1)
        J = jnp.where(jnp.expand_dims(usable, range(3, J.ndim)), J, 0)
        system = self.window.eliminate(J)
        condensed = system.condense(seen.r)
        terms = terms_of(J, seen.points)
        # The equations of the stages may have no solution.
        usable = is_finite(condensed.ys)
        if len(J) == 1:
            # Its start does not move, so what follows from that need not be known.
            ys = jnp.where(usable[:, None], condensed.ys, seen.r.ys)
            return Iterate(ys, condensed.ks), jnp.array(True), terms
        usable = usable & is_finite(system.A.reshape(len(J), -1))
        A = jnp.where(jnp.expand_dims(usable, range(1, system.A.ndim)), system.A, 0)
        r = jnp.where(usable[:, None], condensed.ys, seen.r.ys)
        scan = whole_scan(self.scan, self.window.sharding)
        ys, is_telling = self.method.correct(scan, A, r, seen.at.ys)
        # This changes nothing, unless the scan makes rounding errors larger than ours.
        ys = jnp.where(seen.is_known[:, None], r, ys)
        delta = Iterate(ys, system.substitute(before(ys), condensed))
        return delta, is_telling, terms

    def lost(
        self,
        state: State,
        new: Iterate,
        is_lost: Bool[Array, " substeps"],
        may_be_lost: Bool[Array, " substeps"],
    ) -> Int[Array, ""]:
        """From which substep on to begin again, if at all."""
        is_lost = is_lost & may_be_lost
        if not self.window.is_bounded:
            return first_of(is_lost)
        delta = jtu.tree_map(jnp.subtract, new, state.at)
        is_large = too_large(self.window.y0, new, delta) & may_be_lost
        lost, large = first_of(jnp.stack([is_lost, is_large], axis=1))
        # To begin again where that has just been done does not help.
        helps = (large > state.lost) | (state.lost == len(is_lost))
        return jnp.where(helps, jnp.minimum(lost, large), lost)

    def change(self, old: Iterate, new: Iterate) -> Float[Array, ""]:
        """How large a correction is, in units of the tolerance."""
        delta = jtu.tree_map(lambda x, y: jnp.abs(x - y), new, old)
        largest = jnp.max(delta.ks, axis=(1, 2), initial=0)
        largest = jnp.maximum(largest, delta.ys)
        scale = jnp.maximum(jnp.abs(old.ys), jnp.abs(new.ys))
        change = self.norm(largest / self.tolerance(scale))
        return jnp.asarray(change, largest.dtype)

    def tolerance(
        self, scale: Float[Array, "substeps size"]
    ) -> Float[Array, "substeps size"]:
        """How far values of this size may be from the solution."""
        rtol, atol, eps = self.rtol, self.atol, self.window.eps
        if rtol is None:
            rtol = 40 * eps if is_noisy(eps) else 1e-10
        if atol is None:
            # Small compared with `rtol`, also if the solution itself is small.
            magnitude = jnp.minimum(1, jnp.max(scale, initial=0))
            atol = jnp.maximum(1e-2 * rtol * magnitude, jnp.finfo(scale.dtype).tiny)
        return jnp.asarray(atol + rtol * scale)


class _Seen(eqx.Module):
    """What an iterate looks like."""

    at: Iterate
    points: Float[Array, "substeps points size"]
    values: Float[Array, "substeps parts points size"]
    targets: Iterate
    r: Iterate
    # Where the values are finite.
    okay: Bool[Array, "substeps parts points"]
    # Which substeps lead to anything.
    exists: Bool[Array, " substeps"]
    jacobians: Callable[[], Matrices]

    @property
    def is_known(self) -> Bool[Array, " substeps"]:
        """Which substeps begin with a final value."""
        is_open = jnp.any(self.r.ys != 0, axis=1)
        is_open = is_open | jnp.any(self.r.ks != 0, axis=(1, 2, 3))
        return up_to_front(is_open | jnp.invert(self.exists))

    @property
    def followed(self) -> Bool[Array, " substeps"]:
        """Which substeps end where the next one leads to anything."""
        return after(self.exists, True)

    def corrected(self, delta: Iterate) -> tuple[Iterate, Bool[Array, " substeps"]]:
        """The next iterate, and where it is of any use."""
        # This sum is arranged such that what is known already, where `delta == r`, is
        # exact to the last bit. At least one more unknown is, in every iteration.
        add = lambda target, delta, r: target + (delta - r)
        new = jtu.tree_map(add, self.targets, delta, self.r)
        ys_okay, ks_okay = is_finite(new.ys), is_finite(new.ks)
        ys = jnp.where(ys_okay[:, None], new.ys, self.at.ys)
        ks = jnp.where(ks_okay[..., None], new.ks, self.at.ks)
        return Iterate(ys, ks), ys_okay & jnp.all(ks_okay, axis=(1, 2))


def terms_of(
    J: Matrices, points: Float[Array, "substeps points size"]
) -> Float[Array, "substeps parts points size"]:
    """How large the terms are that values at these points have been summed up from."""
    # Of a sum, rounding errors are in proportion to its largest terms. (To no more than
    # the points: a large `J` must not excuse large residuals far from the solution.)
    return matvec(jnp.minimum(jnp.abs(J), 1), jnp.abs(points)[:, None])


def excesses_of(r: Iterate, bound: Iterate) -> Float[Array, " substeps"]:
    """How large the residuals of each substep are, in units of their bounds."""
    ratio = lambda r, bound: jnp.where(r == 0, 0, jnp.abs(r) / bound)
    ratios = jtu.tree_map(ratio, r, bound)
    ys, ks = jnp.max(ratios.ys, axis=1, initial=0), ratios.ks
    return jnp.maximum(ys, jnp.max(ks, axis=(1, 2, 3), initial=0))


def _drifts(
    window: AbstractWindow, r: Iterate, rounding: Iterate
) -> Float[Array, " substeps"]:
    """The same of the sums of all residuals until then."""
    total = jnp.abs(running(jnp.cumsum, jnp.add, window.net(r), window.sharding))
    bound = running(lax.cummax, jnp.maximum, rounding.ys, window.sharding)
    number = jnp.arange(1, len(total) + 1, dtype=bound.dtype)[:, None]
    ratio = jnp.where(total == 0, 0, total / (jnp.sqrt(number) * bound))
    return jnp.max(ratio, axis=1, initial=0)
