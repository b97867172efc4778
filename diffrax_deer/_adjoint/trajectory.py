"""The solution, as a function of what the user has passed, and its interpolation."""

import dataclasses
import functools as ft
from collections.abc import Callable

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractLocalInterpolation
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, Real

from .._custom_types import PyTree
from .._implicit import as_known, implicit_solution, without_gradient
from .._method import AbstractMethod
from .._scan import AbstractScan
from .._tangents import with_zeros
from .._time_axis import at_index, divided, place_in
from .._window import Discretisation, Iterate, Scheme
from .times import last_of, SubstepTimes


# Into how many parts chunks are divided, and these again.
_BASE = 4


class Rows(eqx.Module):
    """Some of the substeps: the values at their starts, and what these lead to."""

    starts: Float[Array, "*rows size"]
    at: Iterate


class Values(eqx.Module):
    """What is known of the solution.

    **Attributes:**

    - `chunks`: the values at the start of every chunk. `None` once there is nothing
        left that is found from these.
    - `kept`: the substeps in which the solution is asked for.
    - `last`: the last substep of all, or that in which an event has occurred.
    """

    chunks: Float[Array, "chunks size"] | None
    kept: Rows
    last: Rows


class Substeps(eqx.Module):
    """How many there are, and how they are grouped.

    **Attributes:**

    - `number`: how many there are.
    - `kept`: which of these are kept, in order. Followed by numbers that are larger
        than that of any substep.
    - `keeps_all`: whether `kept` are all of them.
    - `per_chunk`: how many of them are differentiated at once.
    """

    number: Int[Array, ""]
    kept: Int[Array, " kept"]
    keeps_all: bool = eqx.field(static=True)
    per_chunk: int = eqx.field(static=True)

    @property
    def last(self) -> Int[Array, ""]:
        return last_of(self.number)

    def split(self, xs: PyTree[Array]) -> PyTree[Array]:
        """The same, with an axis for the chunks."""
        n = self.per_chunk
        # Not with -1, as there may be nothing in it.
        return jtu.tree_map(lambda x: x.reshape(len(x) // n, n, *x.shape[1:]), xs)

    def of_chunk(self, chunk: Int[Array, ""]) -> Int[Array, " per_chunk"]:
        return self.per_chunk * chunk + jnp.arange(self.per_chunk, dtype=jnp.int32)

    def places(self, index: Int[Array, " some"]) -> Int[Array, " some"]:
        """Where these are kept. Those that are not would land behind the end."""
        beyond = len(self.kept) + jnp.arange(len(index), dtype=jnp.int32)
        place = jnp.searchsorted(self.kept, index, method="compare_all")
        is_kept = self.kept[jnp.minimum(place, len(self.kept) - 1)] == index
        is_kept = is_kept & (index < self.number)
        return jnp.where(is_kept, place.astype(jnp.int32), beyond)


class Linearisation(eqx.Module):
    """How the equations of substeps are linearised and solved.

    **Attributes:**

    - `again`: a function `problem -> solution`, which solves them again.
    """

    method: AbstractMethod
    scan: AbstractScan
    sharding: NamedSharding | None = eqx.field(static=True)
    again: Callable[[Discretisation], Iterate]


class System(eqx.Module):
    """All that the solution depends on, once every decision has been made.

    **Attributes:**

    - `scheme`: the differential equation and the solver.
    - `times`: when its substeps begin and end.
    - `substeps`: which of them there are.
    - `is_kept`: whether the substeps have been kept. If not then they are found again.
    - `linearisation`: how they are differentiated by their equations, or `None` if they
        are by what it takes to make them.
    """

    scheme: Scheme
    times: SubstepTimes
    substeps: Substeps
    is_kept: bool = eqx.field(static=True)
    linearisation: Linearisation | None

    def of_substeps(self, index: Int[Array, "*shape"]) -> tuple[Array, Array]:
        """When substeps begin and end. Those that are not used have length zero."""
        return self.times(index, self.substeps.number)

    @property
    def sharding(self) -> NamedSharding | None:
        """How substeps are divided over devices."""
        return None if self.linearisation is None else self.linearisation.sharding

    def chunk(
        self,
        index: Int[Array, ""],
        start: Float[Array, " size"],
        rows: PyTree[Array],
        at: Iterate | None,
        end: Float[Array, " size"],
    ) -> Rows:
        """The substeps of a chunk, as a function of all that they depend on. `rows` are
        what is stored of its steps, `at` its values if these have been kept, and `end`
        is the last value of all."""
        of_all = divided(self.substeps.of_chunk(index), self.sharding)
        number = self.substeps.number
        t0s, t1s = self.times.part(self.substeps.per_chunk * index, rows)(
            of_all, number
        )
        scheme, how = self.scheme, self.linearisation
        scheme = dataclasses.replace(scheme, y0=scheme.unravel(start))
        part = Discretisation(scheme, t0s, t1s, self.sharding)
        if how is None:
            made = part.window.sequential()
        else:
            if at is None:
                at = without_gradient(lambda: how.again(part))
            else:
                # What is not used stays where it is.
                is_used = of_all < number
                ys = jnp.where(is_used[:, None], at.ys, end[None])
                ks = jnp.where(is_used[:, None, None, None], at.ks, 0)
                at = scheme.unknowns(Iterate(ys, ks))
            made: Iterate = implicit_solution(
                at, part.window, method=how.method, scan=how.scan
            )
        # Step size controllers may have stepped over jumps.
        whole = part.whole(made, may_have_gaps=True)
        return Rows(whole.starts, whole.at)


def solution(values: Values, system: System) -> Values:
    """The solution, as a function of the system. Its values must be known already."""
    y0 = system.scheme.ravel(system.scheme.y0)
    substeps, is_kept = system.substeps, system.is_kept
    assert values.chunks is not None
    rows = system.times.split(substeps.number, len(values.chunks), substeps.per_chunk)
    xs = _of_chunks(values, rows, substeps, is_kept)
    # Vector fields may close over what is being differentiated.
    chunk = eqx.filter_closure_convert(
        *(system.chunk, jnp.array(0, jnp.int32)),
        *jtu.tree_map(lambda x: x[0], xs),
        y0,
    )
    return _solution(
        *(values, y0, chunk, rows, substeps), is_kept=is_kept, needs_chunks=False
    )


@eqx.filter_custom_jvp
def _solution(
    values: Values,
    y0: Float[Array, " size"],
    chunk: Callable,
    rows: PyTree[Array],
    substeps: Substeps,
    *,
    is_kept: bool,
    needs_chunks: bool,
) -> Values:
    del y0, chunk, rows, substeps, is_kept
    return values if needs_chunks else _without_chunks(values)


# The derivative goes from chunk to chunk, forwards, and if transposed then backwards.
# Chunks that are not used cost next to nothing.
@_solution.def_jvp
def _(primals, tangents, *, is_kept, needs_chunks):
    values, y0, chunk, rows, substeps = primals
    _, t_y0, t_chunk, _, _ = tangents
    # For higher derivatives: what follows depends on the solution as well.
    values = _solution(
        *(values, y0, chunk, rows, substeps), is_kept=is_kept, needs_chunks=True
    )
    end = values.last.at.ys

    def body(carry, index, x):
        t_start, t_values, t_chunk = carry
        first = substeps.per_chunk * index
        start, rows, at = x
        start = jnp.where(first < substeps.number, start, end)
        solve = lambda chunk, start: chunk(index, start, rows, at, end)
        made, t_rows = eqx.filter_jvp(solve, (chunk, start), (t_chunk, t_start))
        t_rows = with_zeros(t_rows, made)
        t_chunks, t_kept, t_last = t_values.chunks, t_values.kept, t_values.last
        if needs_chunks:
            t_chunks = t_chunks.at[index].add(t_start)
        if substeps.keeps_all:
            place = index
        else:
            place = substeps.places(substeps.of_chunk(index))
        # That is, `set`, the transpose of which would have to copy.
        t_kept = jtu.tree_map(
            lambda x, t: x.at[place].add(t, mode="drop", unique_indices=True),
            *(t_kept, t_rows),
        )
        here = jnp.clip(substeps.last - first, 0, substeps.per_chunk - 1)
        is_here = first + here == substeps.last
        t_last = jtu.tree_map(
            lambda x, t: jnp.where(is_here, at_index(t, here), x), t_last, t_rows
        )
        t_end = at_index(t_rows.at.ys, substeps.per_chunk - 1)
        return t_end, Values(t_chunks, t_kept, t_last), t_chunk

    zeros = lambda x: jtu.tree_map(jnp.zeros_like, x)
    t_y0, t_kept, t_last = with_zeros(t_y0, y0), zeros(values.kept), zeros(values.last)
    if substeps.keeps_all:
        t_kept = substeps.split(t_kept)
    # If there is no substep at all.
    t_last = eqx.tree_at(lambda r: (r.starts, r.at.ys), t_last, (t_y0, t_y0))
    t_values = Values(zeros(values.chunks) if needs_chunks else None, t_kept, t_last)
    num_used = -(-substeps.number // substeps.per_chunk)
    # Also what never changes. If that were a constant of the loop, then its cotangent
    # would be added up over all chunks, rather than over those that are used.
    carry = t_y0, t_values, t_chunk
    xs = _of_chunks(values, rows, substeps, is_kept)
    # Wherever a scan skips something, it has to copy its carry. If that is little then
    # it is quicker to compile, and for higher derivatives to run.
    loop = linear_loop if substeps.keeps_all else scan_used
    _, t_values, _ = loop(body, carry, xs, num_used)
    if not needs_chunks:
        values = _without_chunks(values)
    join = lambda t, x: t.reshape(x.shape)
    return values, jtu.tree_map(join, t_values, values)


def _without_chunks(values: Values) -> Values:
    return Values(None, values.kept, values.last)


def _of_chunks(values: Values, rows: PyTree[Array], substeps: Substeps, is_kept: bool):
    """What of the values each of the chunks is found from."""
    return values.chunks, rows, substeps.split(values.kept.at) if is_kept else None


def linear_loop(
    body: Callable,
    carry: PyTree[Array],
    xs: PyTree[Array],
    num_used: Int[Array, ""],
) -> PyTree[Array]:
    """As `scan_used`, of a body that is linear in the carry, but what is not used costs
    nothing. Its transpose is the same loop backwards, of the transposes of the body."""
    if _length(xs) == 1:
        # Then this is no loop at all.
        return scan_used(body, carry, xs, num_used)
    # In a batch, all go on until the last one is done.
    num_used = eqxi.unvmap_max(num_used)
    step = lambda carry, index: body(carry, index, jtu.tree_map(lambda x: x[index], xs))

    def forwards(carry):
        return lax.fori_loop(0, num_used, lambda i, carry: step(carry, i), carry)

    def backwards(carry):
        def undo(i, carry):
            index = num_used - 1 - i
            transpose = jax.linear_transpose(lambda carry: step(carry, index), carry)
            [carry] = transpose(carry)
            return carry

        return lax.fori_loop(0, num_used, undo, carry)

    # JAX asks for a linear system, of which these loops are the solutions: `x = carry`
    # and `y - loop(x) = 0`. What it consists of only serves for higher derivatives.
    add, subtract = (ft.partial(jtu.tree_map, op) for op in (jnp.add, jnp.subtract))

    def system(z):
        x, y = _tied(z)
        return _tied((x, subtract(y, scan_used(body, x, xs, num_used))))

    _, carry = lax.custom_linear_solve(
        system,
        _tied((carry, jtu.tree_map(jnp.zeros_like, carry))),
        solve=lambda _, z: (z[0], add(z[1], forwards(z[0]))),
        transpose_solve=lambda _, z: (add(z[0], backwards(z[1])), z[1]),
    )
    return carry


def _tied(xs: PyTree[Array]) -> PyTree[Array]:
    """The same, if each of them seems to depend on all others. JAX does not transpose a
    linear system unless all of its right-hand side depends on what is differentiated.
    """
    total = ft.reduce(jnp.add, [jnp.sum(x) for x in jtu.tree_leaves(xs)])
    return jtu.tree_map(lambda x: jnp.where(False, total.astype(x.dtype), x), xs)


def scan_used(
    body: Callable,
    carry: PyTree[Array],
    xs: PyTree[Array],
    num_used: Int[Array, ""],
) -> PyTree[Array]:
    """As `lax.scan` without outputs, of a body that also gets the index, but only the
    first `num_used` do anything.

    It can be differentiated, in forward and in reverse mode, like any scan, for which
    reason it is no `while` loop. Nothing is stored for that: what is needed is made
    again.
    """
    # In a batch, `lax.cond` would otherwise evaluate both of its branches.
    num_used = eqxi.unvmap_max(num_used)
    # Around the `lax.cond`: what one of its branches stores, the other one has to fill
    # with zeros.
    remake = ft.partial(jax.checkpoint, prevent_cse=False)

    def make(carry, first, xs, offset):
        # All from `first` on, of which there are as many as `xs`. These begin with that
        # of `offset`: the last part is cut out earlier, so as not to reach too far.
        size = _length(xs)
        if size == 1:
            x = jtu.tree_map(lambda x: x[0], xs)
            return remake(body)(carry, first, x)
        # In turn in parts, so that those not used are skipped many at a time.
        part = 1
        while part * _BASE < size:
            part *= _BASE
        number = -(-size // part)

        @remake
        def one(carry, first):
            # Whatever is used in there is also stored, but not from all of it.
            start = jnp.minimum(first - offset, size - part)
            cut = lambda x: lax.dynamic_slice_in_dim(x, start, part)
            some = jtu.tree_map(cut, xs)
            do = lambda carry: make(carry, first, some, offset + start)
            return lax.cond(first < num_used, do, lambda carry: carry, carry), None

        firsts = first + part * jnp.arange(number, dtype=jnp.int32)
        carry, _ = lax.scan(one, carry, firsts)
        return carry

    first = jnp.array(0, jnp.int32)
    return make(carry, first, xs, first)


def _length(xs: PyTree[Array]) -> int:
    return len(jtu.tree_leaves(xs)[0])


class Points(eqx.Module):
    """The solution at the save times, if it has been saved on the way. From `number` on
    these have not been reached, and instead have the value at the start. So do those
    that fill up the last row."""

    ts: Real[Array, " points"]
    ys: Float[Array, "rows points_per_row size"]
    number: Int[Array, ""]


class Trajectory(eqx.Module):
    """The solution and its interpolation.

    **Attributes:**

    - `t0`: when it begins.
    - `last_ts`: when the last substep begins and ends.
    - `last_y`: the value at its end.
    - `points`: what need not be interpolated, as it is known already.
    """

    system: System
    values: Values
    t0: Real[Array, ""]
    last_ts: tuple[Real[Array, ""], Real[Array, ""]]
    last_y: PyTree[Array]
    points: Points | None

    @property
    def t1(self) -> Real[Array, ""]:
        _, t1 = self._last_times()
        return jnp.where(self.system.substeps.number == 0, self.t0, t1)

    @property
    def y1(self) -> PyTree[Array]:
        y1 = self.system.scheme.unravel(self.values.last.at.ys)
        return as_known(self.last_y, y1)

    def at_last(self) -> AbstractLocalInterpolation:
        """The interpolation over the last substep."""
        index = self.system.substeps.last
        rows = jtu.tree_map(lambda x: x[None], self.values.last)
        t0, t1 = self._last_times()
        infos = self._infos(index[None], rows, (t0[None], t1[None]))
        info = jtu.tree_map(lambda x: x[0], infos)
        return self.system.scheme.interpolation(t0, t1, info)

    def dense_infos(self) -> PyTree[Array]:
        """What Diffrax keeps for dense output, of all substeps that are kept."""
        kept = self.system.substeps.kept
        return self._infos(kept, self.values.kept, self.system.of_substeps(kept))

    def evaluate(self, ts: Real[Array, " times"]) -> PyTree[Array]:
        """The solution at many times at once, in substeps that are kept."""
        kept, of_substeps = self.system.substeps.kept, self.system.of_substeps
        times = lax.stop_gradient(of_substeps(kept))
        starts, ends = divided(times, self.system.sharding)
        index = _which(starts, ends, ts)
        of_kept = lambda x: jtu.tree_map(lambda x: x[index], x)
        # Whichever is less. (Some solvers have to make their steps again.)
        if len(ts) > len(kept):
            t0s, t1s = of_substeps(kept)
            infos = self._infos(kept, self.values.kept, (t0s, t1s))
            t0s, t1s, infos = of_kept((t0s, t1s, infos))
        else:
            t0s, t1s = of_substeps(kept[index])
            infos = self._infos(kept[index], of_kept(self.values.kept), (t0s, t1s))
        return self.system.scheme.evaluate(ts, t0s, t1s, infos)

    def at_points(self, ts: Real[Array, " times"], ys: PyTree[Array]) -> PyTree[Array]:
        """`ys`, found by `evaluate`. At those `ts` that have been saved on the way, the
        value is known."""
        if self.points is None:
            return ys
        known, scheme = self.points, self.system.scheme
        rows = known.ys.reshape(-1, known.ys.shape[-1])[: len(known.ts)]
        if len(ts) != len(known.ts):
            # They are among those of other `SubSaveAt`s.
            rows = rows[place_in(known.ts, ts)]
        return as_known(lax.stop_gradient(scheme.unravel_all(rows)), ys)

    def _last_times(self):
        times = self.system.of_substeps(self.system.substeps.last)
        return as_known(self.last_ts, times)

    def _infos(self, index, rows, ts):
        # What is not used must nonetheless be finite.
        is_used = index < self.system.substeps.number
        y1 = self.values.last.at.ys[None]
        starts = jnp.where(is_used[:, None], rows.starts, y1)
        ys = jnp.where(is_used[:, None], rows.at.ys, y1)
        at = Iterate(ys, jnp.where(is_used[:, None, None, None], rows.at.ks, 0))
        t0s, t1s = ts
        scheme = self.system.scheme
        return scheme.outputs(scheme.inputs(t0s, t1s), starts, at, None).dense_info


def _which(
    starts: Real[Array, " substeps"],
    ends: Real[Array, " substeps"],
    ts: Real[Array, " times"],
) -> Int[Array, " times"]:
    """In which of these substeps the times are, or nearest to which."""
    after = jnp.minimum(place_in(ends, ts), len(ends) - 1)
    # When substeps were kept, their times may have been rounded otherwise. So where one
    # ends at a save time, it may seem to end before, and the next one to be far away.
    before = jnp.maximum(after - 1, 0)
    is_before = (after > 0) & (ts - ends[before] < starts[after] - ts)
    return jnp.where(is_before, before, after)
