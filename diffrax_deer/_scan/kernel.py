import functools as ft

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from .._linear_algebra import Matrices
from .associative import AssociativeScan, clip
from .base import AbstractScan


try:
    from jax.experimental.pallas import triton as plt
except ImportError:
    # It is experimental, and JAX has announced that it will go.
    plt = None


# The number of terms that a program makes one after the other, in registers.
_CHUNK = 16
# A recurrence that is not longer than this is made by a single program.
_SHORT = 32
# Larger matrices do not fit into registers.
_MAX_SIZE = 16
_NUM_WARPS = 1
# What a thread of a program holds: of a product one column of one chunk, and of the
# matrices of all chunks, while evaluating them, as many entries.
_THREADS = 32 * _NUM_WARPS
_ENTRIES = 8


class KernelScan(AbstractScan):
    r"""Evaluates the linear recurrence on an Nvidia GPU, in a few kernels.

    The recurrence is cut into chunks. All of them are composed into one affine map
    each, at once, and each of them one term after the other, in registers. These maps
    are a recurrence that is shorter by the length of a chunk, and that is evaluated in
    the same way. Then all chunks are evaluated, from the values that they start with.
    So all matrices are read twice, and about one in 15 is written, whereas
    [`diffrax_deer.AssociativeScan`][] reads and writes many of them in its rounds.

    This is for recurrences in single or double precision, of diagonal matrices or of
    matrices of at most 16 rows. Everything else is left to
    [`diffrax_deer.AssociativeScan`][].

    The kernels are written in Pallas, for its Triton backend. JAX warns that this is
    deprecated, from version 0.11 on. Versions without it are left to
    [`diffrax_deer.AssociativeScan`][], too.
    """

    interpret: bool = eqx.field(default=False, static=True)

    def __call__(
        self, A: Matrices, b: Float[Array, "substeps size"], *, reverse: bool = False
    ) -> Float[Array, "substeps size"]:
        if not can_be_kernels(A, b):
            return AssociativeScan()(A, b, reverse=reverse)
        kernels = lambda A, b: _scan(A, b, reverse, self.interpret)
        if self.interpret:
            return kernels(A, b)
        else:
            return lax.platform_dependent(A, b, cpu=_refuse, default=kernels)


KernelScan.__init__.__doc__ = """**Arguments:**

- `interpret`: whether to interpret the kernels, which works anywhere, and is slow. For
    tests.
"""


def can_be_kernels(A: Matrices, b: Float[Array, "substeps size"]) -> bool:
    is_small = A.ndim == b.ndim or b.shape[1] <= _MAX_SIZE
    is_known = A.dtype == b.dtype and A.dtype in (jnp.float32, jnp.float64)
    return plt is not None and is_small and is_known


def has_gpu() -> bool:
    """Whether there is a GPU to compile the kernels for, and one that Triton knows."""
    if jax.default_backend() != "gpu":
        return False
    # Of others than those of Nvidia, this is a name.
    major, *_ = str(getattr(jax.devices()[0], "compute_capability", "")).split(".")
    return major.isdigit() and int(major) >= 8


def _refuse(A, b):
    # When it runs, as from a CPU this may also be compiled for somewhere else.
    del A
    always = jnp.all(jnp.isnan(b)) | True
    return eqx.error_if(
        b,
        always,
        "`KernelScan()` is for Nvidia GPUs, and this runs on a CPU. Leave `scan=...` "
        "away, as the default takes kernels wherever there is a GPU for them, or pass "
        "`scan=AssociativeScan()`. (`KernelScan(interpret=True)` runs anywhere, but is "
        "slow.)",
    )


@ft.partial(jax.jit, static_argnames=("reverse", "interpret"))
def _scan(A, b, reverse, interpret):
    length, size = b.shape
    if length == 0 or size == 0:
        return jnp.zeros_like(b)
    chunks = ft.partial(_Chunks, size, A.ndim == b.ndim, reverse, interpret)
    zero = jnp.zeros_like(b[:1])
    if length <= _SHORT:
        return chunks(length, length).evaluate(A, b, zero)
    chunks = chunks(length, _CHUNK)
    ends = _scan(*chunks.compose(A, b), reverse, interpret)
    if reverse:
        starts = jnp.concatenate([ends[1:], zero])
    else:
        starts = jnp.concatenate([zero, ends[:-1]])
    return chunks.evaluate(A, b, starts)


class _Chunks:
    """The chunks of a recurrence. Each of the programs of a kernel has some of them."""

    def __init__(self, size, is_diagonal, reverse, interpret, length, chunk):
        self.size, self.is_diagonal, self.reverse = size, is_diagonal, reverse
        self.interpret, self.length, self.chunk = interpret, length, chunk
        # Triton only has arrays whose axes are powers of two.
        self.padded = pl.next_power_of_2(size)
        self.number = pl.cdiv(length, chunk)

    def compose(self, A, b):
        """Every chunk as an affine map."""
        out = (
            jax.ShapeDtypeStruct((self.number, *A.shape[1:]), A.dtype),
            jax.ShapeDtypeStruct((self.number, self.size), b.dtype),
        )
        kernel = self._compose_diagonal if self.is_diagonal else self._compose
        return self._call(kernel, out, _THREADS // self.padded)(A, b)

    def evaluate(self, A, b, starts):
        """All terms of every chunk."""
        out = jax.ShapeDtypeStruct(b.shape, b.dtype)
        entries = self.padded if self.is_diagonal else self.padded**2
        per_program = min(_ENTRIES * _THREADS // entries, _THREADS)
        return self._call(self._evaluate, out, per_program)(A, b, starts)

    def _call(self, kernel, out, per_program):
        assert plt is not None
        # For diagonal matrices of any size.
        per_program = max(per_program, 1)
        per_program = min(per_program, pl.next_power_of_2(self.number))
        grid = pl.cdiv(self.number, per_program)
        return pl.pallas_call(
            ft.partial(kernel, per_program),
            out_shape=out,
            grid=(grid,),
            compiler_params=plt.CompilerParams(num_warps=_NUM_WARPS),
            interpret=self.interpret,
        )

    def _compose(self, per_program, A_ref, b_ref, P_ref, q_ref):
        # The axes are `(column, row, chunk)` for `A` and `(row, chunk, column)` for the
        # product `P` that it is multiplied with. Triton distributes the last axes over
        # threads first. So each has a column of `P`, and all that it is summed over.
        chunks = self._chunks(per_program)
        column, row = self._iota(0, 3), self._iota(1, 3)
        entry = self._iota(0, 2)

        def load(i):
            terms, exists = self._terms(chunks, i)
            A = self._load(A_ref, (terms[None, None], row, column), exists[None, None])
            return A, self._load(b_ref, (terms[None], entry), exists[None])

        def body(i, carry):
            (A, b), P, q = carry
            # There is something to be done while these arrive. (They are one too many.)
            following = load(jnp.minimum(i + 1, self.chunk - 1))
            products = A[:, :, :, None] * P[:, None, :, :]
            P = clip(jnp.sum(products, axis=0), self.size)
            q = jnp.sum(A * q[:, None, :], axis=0) + b
            return following, P, q

        row_of_P, column_of_P = self._iota(0, 3), self._iota(2, 3)
        shape = (self.padded, per_program, self.padded)
        eye = (row_of_P == column_of_P).astype(A_ref.dtype)
        P = jnp.broadcast_to(eye, shape)
        q = jnp.zeros(shape[:2], b_ref.dtype)
        _, P, q = lax.fori_loop(0, self.chunk, body, (load(0), P, q))
        exists = chunks < self.number
        at = (chunks[None, :, None], row_of_P, column_of_P)
        self._store(P_ref, at, exists[None, :, None], P)
        self._store(q_ref, (chunks[None], entry), exists[None], q)

    def _compose_diagonal(self, per_program, A_ref, b_ref, P_ref, q_ref):
        chunks = self._chunks(per_program)
        entry = self._iota(1, 2)

        def body(i, P__q):
            P, q = P__q
            terms, exists = self._terms(chunks, i)
            A, b = (
                self._load(ref, (terms[:, None], entry), exists[:, None])
                for ref in (A_ref, b_ref)
            )
            return clip(A * P, 1), A * q + b

        shape = (per_program, self.padded)
        init = (jnp.ones(shape, A_ref.dtype), jnp.zeros(shape, b_ref.dtype))
        P, q = lax.fori_loop(0, self.chunk, body, init)
        exists = chunks < self.number
        self._store(P_ref, (chunks[:, None], entry), exists[:, None], P)
        self._store(q_ref, (chunks[:, None], entry), exists[:, None], q)

    def _evaluate(self, per_program, A_ref, b_ref, start_ref, out_ref):
        chunks = self._chunks(per_program)
        entry = self._iota(1, 2)

        def load(i):
            terms, exists = self._terms(chunks, i)
            b = self._load(b_ref, (terms[:, None], entry), exists[:, None])
            if self.is_diagonal:
                A = self._load(A_ref, (terms[:, None], entry), exists[:, None])
            else:
                at = (terms[:, None, None], self._iota(1, 3), self._iota(2, 3))
                A = self._load(A_ref, at, exists[:, None, None])
            return A, b

        def body(i, carry):
            (A, b), x = carry
            following = load(jnp.minimum(i + 1, self.chunk - 1))
            if self.is_diagonal:
                x = A * x + b
            else:
                x = jnp.sum(A * x[:, None, :], axis=2) + b
            terms, exists = self._terms(chunks, i)
            self._store(out_ref, (terms[:, None], entry), exists[:, None], x)
            return following, x

        exists = chunks < self.number
        x = self._load(start_ref, (chunks[:, None], entry), exists[:, None])
        lax.fori_loop(0, self.chunk, body, (load(0), x))

    def _chunks(self, per_program):
        return pl.program_id(0) * per_program + lax.iota(jnp.int32, per_program)

    def _terms(self, chunks, i):
        """The `i`th term of every chunk, and whether it exists. The last chunk may be
        shorter. What is missing there is zero, which does no harm in either direction:
        either there is nothing before it, or nothing after it."""
        i = self.chunk - 1 - i if self.reverse else i
        terms = chunks * self.chunk + i
        return terms, terms < self.length

    def _iota(self, axis, ndim):
        shape = [1] * ndim
        shape[axis] = self.padded
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def _mask(self, at, exists):
        if self.padded != self.size:
            for entry in at[1:]:
                exists = exists & (entry < self.size)
        return exists

    def _load(self, ref, at, exists):
        assert plt is not None
        return plt.load(ref.at[at], mask=self._mask(at, exists), other=0)

    def _store(self, ref, at, exists, values):
        assert plt is not None
        plt.store(ref.at[at], values, mask=self._mask(at, exists))
