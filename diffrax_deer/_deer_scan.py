from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from diffrax import RESULTS
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, Shaped

from ._checks import (
    check_instance,
    check_optional_int,
    check_sharding,
    check_state,
    check_tolerance,
    check_trajectory,
)
from ._custom_types import PyTree, RealScalarLike
from ._dependence import inputs_read
from ._failure import error_if_any, NONFINITE, TOO_MANY_ITERATIONS
from ._implicit import with_derivative, without_gradient
from ._iterate import Iteration
from ._method import AbstractMethod, DEER
from ._scan import AbstractScan, AutoScan
from ._time_axis import divided
from ._window import (
    AbstractMapWindow,
    among_neighbours,
    Iterate,
    nearby,
    noise,
    precision,
    ravel,
    unravel_like,
)


_Carry = TypeVar("_Carry")


class ScanSolution(eqx.Module):
    """What [`diffrax_deer.deer_scan_solution`][] returns.

    **Attributes:**

    - `carry`: the final carry.
    - `ys`: the outputs, stacked.
    - `carries`: the carries after each element, stacked like `ys`. This is the `guess`
        for the next time.
    - `num_iterations`: the number of iterations. An integer.
    - `result`: `diffrax.RESULTS.successful`, or why there is no solution. Then the
        floating point parts of all carries are those of `init`.
    """

    carry: PyTree[Array]
    ys: PyTree[Array]
    carries: PyTree[Array]
    num_iterations: Int[Array, ""]
    result: RESULTS


class _Recurrence(AbstractMapWindow):
    """Substeps that are the elements of a scan."""

    fn: Callable
    xs: PyTree[Shaped[Array, "substeps ..."]]
    y0: Float[Array, " size"]
    eps: float
    sharding: NamedSharding | None = eqx.field(static=True)

    def value(
        self, x: PyTree[Array], points: Float[Array, "1 size"]
    ) -> Float[Array, "1 1 size"]:
        return self.fn(x, points[0])[None, None]

    def noise(
        self,
        points: Float[Array, "substeps 1 size"],
        r: Iterate,
        wanted: Bool[Array, ""],
    ) -> Float[Array, "substeps 1 1 size"]:
        # From as near as the residuals are large, as then it does not matter how much
        # a function is curved.
        most = lambda x: among_neighbours(jnp.max, jnp.abs(x))
        distance = nearby(most(points), self.eps)
        distance = jnp.minimum(most(r.ys)[:, None], distance)
        return noise(self.values, points, distance, wanted)


def deer_scan(
    f: Callable[[_Carry, Any], tuple[_Carry, Any]],
    init: _Carry,
    xs: PyTree[Any],
    length: int | None = None,
    reverse: bool = False,
    *,
    method: AbstractMethod = DEER(),
    scan: AbstractScan = AutoScan(),
    guess: PyTree[Any] | None = None,
    rtol: RealScalarLike | None = None,
    atol: RealScalarLike | None = None,
    max_iters: int | None = None,
    sharding: NamedSharding | None = None,
) -> tuple[_Carry, Any]:
    """`jax.lax.scan`, in parallel over the elements.

    All carries are found at once, by an iteration whose every pass evaluates `f` for
    all elements in parallel, and solves a linear recurrence between them. Up to the
    tolerance of this iteration they are those of `jax.lax.scan`, and so are the
    derivatives, of any order, in forward and in reverse mode, with respect to `init`,
    `xs`, and all that `f` closes over.

    It pays where one element after the other leaves the device idle: for long sequences
    and small carries. `f` has to be differentiable in forward mode with respect to the
    carry.

    !!! example

        ```python
        def classify(cell, xs):
            f = lambda carry, x: (cell(x, carry), None)
            carry, _ = deer_scan(f, jnp.zeros(cell.hidden_size), xs)
            return carry

        jax.vmap(classify, in_axes=(None, 0))(equinox.nn.GRUCell(...), batch_of_xs)
        ```

    **Arguments:**

    - `f`, `init`, `xs`, `length`, `reverse`: as for `jax.lax.scan`. Parts of the carry
        that are not floating point numbers (a counter, a random key) may not depend on
        those that are, and are found sequentially.
    - `method`: how `f` is linearised. See [`diffrax_deer.AbstractMethod`][]. For a
        carry of hundreds of numbers use [`diffrax_deer.QuasiDEER`][].
    - `scan`: how the linear recurrence is evaluated. See
        [`diffrax_deer.AbstractScan`][].
    - `guess`: the first guess: a PyTree like `init` with an additional leading axis,
        for the carries after each element (in the order of `xs`). Defaults to `init`
        throughout. It is not differentiated.
    - `rtol`, `atol`, `max_iters`, `sharding`: as for [`diffrax_deer.DeerSolver`][].
        With a `sharding`, `xs` is divided like it.

    **Returns:**

    The final carry and the stacked outputs, like `jax.lax.scan`. If the iteration does
    not converge then this raises an error at run time.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{lim2024parallelizing,
            author={Lim, Yi Heng and Zhu, Qi and Selfridge, Joshua and
                    Kasim, Muhammad Firmansyah},
            title={Parallelizing non-linear sequential models over the sequence length},
            booktitle={International Conference on Learning Representations},
            year={2024},
        }
        ```
    """
    solution = deer_scan_solution(
        *(f, init, xs, length, reverse),
        method=method,
        scan=scan,
        guess=guess,
        rtol=rtol,
        atol=atol,
        max_iters=max_iters,
        sharding=sharding,
    )
    out = (solution.carry, solution.ys)
    # Only what is floating point has been iterated on. (Random keys cannot be checked.)
    floats, others = eqx.partition(out, eqx.is_inexact_array)
    if len(jtu.tree_leaves(floats)) == 0:
        return out
    errors = [
        (
            solution.result == NONFINITE,
            "`deer_scan` has got nonfinite values (inf or NaN). Either `init` or `xs` "
            "contain them, or `f` returns them: for the solution itself, or (if "
            "`max_iters` is small) for an iterate far from it.",
        ),
        (
            solution.result == TOO_MANY_ITERATIONS,
            "`deer_scan` has not converged within `max_iters` iterations. Pass a "
            "larger `max_iters` (by default there are as many as may be needed), or a "
            "better `guess`. A recurrence that is chaotic takes as many iterations as "
            "it has elements: use `jax.lax.scan`.",
        ),
    ]
    return eqx.combine(error_if_any(floats, errors), others)


def deer_scan_solution(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: PyTree[Any],
    xs: PyTree[Any],
    length: int | None = None,
    reverse: bool = False,
    *,
    method: AbstractMethod = DEER(),
    scan: AbstractScan = AutoScan(),
    guess: PyTree[Any] | None = None,
    rtol: RealScalarLike | None = None,
    atol: RealScalarLike | None = None,
    max_iters: int | None = None,
    sharding: NamedSharding | None = None,
) -> ScanSolution:
    """As [`diffrax_deer.deer_scan`][], but tells how it went.

    **Arguments:**

    As for [`diffrax_deer.deer_scan`][].

    **Returns:**

    A [`diffrax_deer.ScanSolution`][]. This does not raise an error if the iteration
    fails: look at its `result`.
    """
    check_instance(method, AbstractMethod, "deer_scan(method=...)")
    check_instance(scan, AbstractScan, "deer_scan(scan=...)")
    check_tolerance(rtol, "deer_scan(rtol=...)")
    check_tolerance(atol, "deer_scan(atol=...)")
    check_optional_int(max_iters, "deer_scan(max_iters=...)")
    if sharding is not None:
        check_sharding(sharding, _length(xs, length), "deer_scan(sharding=...)")
    # Whatever JAX refuses, it refuses here.
    reference = lambda: lax.scan(f, init, xs, length, reverse)
    carry_form, _ = jax.eval_shape(reference)
    init = jtu.tree_map(_as, init, carry_form)
    length = _length(xs, length)
    guess = _guess_or_constant(guess, init, length)
    if length == 0:
        carry, ys = reference()
        zero = jnp.array(0, jnp.int32)
        return ScanSolution(carry, ys, guess, zero, RESULTS.successful)
    if reverse:
        xs, guess = _flip(xs), _flip(guess)
    xs, guess = divided((xs, guess), sharding)

    # Many occurrences, one trace.
    f = jax.jit(f)
    floats, others = eqx.partition(init, eqx.is_inexact_array)
    check_state(floats, "init")
    other_starts, other_ends = _scan_others(f, floats, others, xs, length)
    y0, unravel = ravel(floats, floats), unravel_like(floats)

    def substep(other__x, y):
        other, x = other__x
        carry, _ = f(eqx.combine(unravel(y), other), x)
        return _ravel_floats(carry)

    xs_of_substeps = (other_starts, xs)
    first = jtu.tree_map(lambda x: x[0], xs_of_substeps)
    window = _Recurrence(
        fn=eqx.filter_closure_convert(substep, first, y0),
        xs=xs_of_substeps,
        y0=y0,
        eps=precision(floats),
        sharding=sharding,
    )
    iteration = Iteration(
        window=window,
        method=method,
        scan=scan,
        rtol=rtol,
        atol=atol,
        norm=optx.max_norm,
        max_iters=max_iters,
    )
    ravel_all = jax.vmap(_ravel_floats, axis_size=length)
    first_guess = lambda: window.finite(window.interpolated(ravel_all(guess)))
    solution = without_gradient(lambda: iteration.run(first_guess()))
    solution = with_derivative(solution, iteration)

    def output(start, other, x):
        _, y = f(eqx.combine(unravel(start), other), x)
        return y

    starts = window.starts(solution.at.ys)
    ys = jax.vmap(output, axis_size=length)(starts, other_starts, xs)
    carries = eqx.combine(jax.vmap(unravel)(solution.at.ys), other_ends)
    carry = jtu.tree_map(lambda x: x[-1], carries)
    if reverse:
        ys, carries = _flip(ys), _flip(carries)
    return ScanSolution(carry, ys, carries, solution.num_iterations, solution.result)


def _as(x, form):
    x = x if eqx.is_array(x) else jnp.asarray(x)
    return x if x.dtype == form.dtype else x.astype(form.dtype)


def _length(xs, length):
    leaves = jtu.tree_leaves(xs)
    return int(length) if len(leaves) == 0 else jnp.shape(leaves[0])[0]


def _flip(xs):
    return jtu.tree_map(lambda x: jnp.flip(x, axis=0), xs)


def _ravel_floats(carry):
    floats = eqx.filter(carry, eqx.is_inexact_array)
    return ravel(floats, floats)


def _guess_or_constant(guess, init, length):
    if guess is None:
        return jtu.tree_map(lambda x: jnp.broadcast_to(x, (length, *x.shape)), init)
    message = (
        "`deer_scan(guess=...)` must be a PyTree like `init`, with an additional "
        f"leading axis for the {length} elements on every leaf."
    )
    check_trajectory(guess, init, length, message)
    return guess


def _scan_others(f, floats, others, xs, length):
    """The parts of the carries that are not floating point numbers, before and after
    each element."""
    if len(jtu.tree_leaves(others)) == 0:
        return others, others

    def step(floats, others, x):
        carry, _ = f(eqx.combine(floats, others), x)
        return eqx.filter(carry, eqx.is_inexact_array, inverse=True)

    x = jtu.tree_map(lambda x: x[0], xs)
    reads = inputs_read(step, floats, others, x)
    if any(reads[: len(jtu.tree_leaves(floats))]):
        raise TypeError(
            "`deer_scan(f, ...)` cannot take a carry of which some part that is not "
            "floating point depends on one that is, as there is no derivative to find "
            "it by. Use `jax.lax.scan`."
        )
    floats = lax.stop_gradient(floats)

    def body(others, x):
        new_others = step(floats, others, x)
        return new_others, (others, new_others)

    _, starts_and_ends = lax.scan(body, others, xs, length)
    return starts_and_ends
