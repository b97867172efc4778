import functools as ft

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from .associative import AssociativeScan, clip
from .base import AbstractScan, Matrices


# The number of terms that a program makes one after the other, in registers.
_CHUNK = 32
# A recurrence that is not longer than this is made by a single program.
_SHORT = 64
# Larger matrices do not fit into registers.
_MAX_SIZE = 16
# What a program makes at once: at most as many products, of at most as many chunks.
_PRODUCTS = 8192
_CHUNKS = 128
_NUM_WARPS = 4


class KernelScan(AbstractScan):
    r"""Evaluates the linear recurrence on an Nvidia GPU, in a few kernels.

    The recurrence is cut into chunks. All of them are composed into one affine map
    each, at once, and each of them one term after the other, in registers. These maps
    are a recurrence that is shorter by the length of a chunk, and that is evaluated in
    the same way. Then all chunks are evaluated, from the values that they start with.
    So all matrices are read twice, and about one in 30 is written, whereas
    [`diffrax_deer.AssociativeScan`][] reads and writes many of them in its rounds.

    Matrices of more than 16 rows (unless diagonal) are left to
    [`diffrax_deer.AssociativeScan`][], and so is damping ([`diffrax_deer.ELK`][]).

    !!! warning

        This has never run on a GPU yet. It is tested with the interpreter of Pallas,
        and is not the default anywhere.
    """

    interpret: bool = eqx.field(default=False, static=True)

    def __call__(
        self, A: Matrices, b: Float[Array, "substeps size"], *, reverse: bool = False
    ) -> Float[Array, "substeps size"]:
        if A.ndim != b.ndim and b.shape[1] > _MAX_SIZE:
            return AssociativeScan()(A, b, reverse=reverse)
        return _scan(A, b, reverse, self.interpret)

    def damped(
        self, A: Matrices, b: Float[Array, "substeps size"], damping: Float[Array, ""]
    ) -> Float[Array, "substeps size"]:
        return AssociativeScan().damped(A, b, damping)


KernelScan.__init__.__doc__ = """**Arguments:**

- `interpret`: whether to interpret the kernels, which works anywhere, and is slow. For
    tests.
"""


@ft.partial(jax.jit, static_argnames=("reverse", "interpret"))
def _scan(A, b, reverse, interpret):
    length, size = b.shape
    if length == 0 or size == 0:
        return jnp.zeros_like(b)
    call = ft.partial(_Call, size, A.ndim == b.ndim, reverse, interpret)
    if length <= _SHORT:
        return call(length, length).evaluate(A, b, jnp.zeros_like(b[:1]))
    chunks = call(length, _CHUNK)
    ends = _scan(*chunks.compose(A, b), reverse, interpret)
    zero = jnp.zeros_like(b[:1])
    if reverse:
        starts = jnp.concatenate([ends[1:], zero])
    else:
        starts = jnp.concatenate([zero, ends[:-1]])
    return chunks.evaluate(A, b, starts)


class _Call:
    """A kernel whose every program has some of the chunks of a recurrence."""

    def __init__(self, size, is_diagonal, reverse, interpret, length, chunk):
        self.size, self.is_diagonal, self.reverse = size, is_diagonal, reverse
        self.length, self.chunk, self.interpret = length, chunk, interpret
        # Triton only has arrays whose axes are powers of two.
        self.padded = pl.next_power_of_2(size)
        self.num_chunks = pl.cdiv(length, chunk)
        products = self.padded if is_diagonal else self.padded**3
        self.per_program = min(
            *(max(_PRODUCTS // products, 1), _CHUNKS),
            pl.next_power_of_2(self.num_chunks),
        )

    def compose(self, A, b):
        """Every chunk as an affine map."""
        out = (
            jax.ShapeDtypeStruct((self.num_chunks, *A.shape[1:]), A.dtype),
            jax.ShapeDtypeStruct((self.num_chunks, self.size), b.dtype),
        )
        return self._call(self._compose, out)(A, b)

    def evaluate(self, A, b, starts):
        """All terms of every chunk."""
        out = jax.ShapeDtypeStruct(b.shape, b.dtype)
        return self._call(self._evaluate, out)(A, b, starts)

    def _call(self, kernel, out):
        return pl.pallas_call(
            kernel,
            out_shape=out,
            grid=(pl.cdiv(self.num_chunks, self.per_program),),
            compiler_params=plt.CompilerParams(num_warps=_NUM_WARPS),
            interpret=self.interpret,
        )

    def _compose(self, A_ref, b_ref, P_ref, q_ref):
        chunks = self._chunks()

        def body(i, P__q):
            P, q = P__q
            A, b, _ = self._terms(chunks, i, A_ref, b_ref)
            if self.is_diagonal:
                P = clip(A * P, 1)
            else:
                products = A[:, :, :, None] * P[:, None, :, :]
                P = clip(jnp.sum(products, axis=2), self.size)
            return P, self._apply(A, q, b)

        shape = (self.per_program, self.padded)
        q = jnp.zeros(shape, b_ref.dtype)
        if self.is_diagonal:
            P = jnp.ones(shape, A_ref.dtype)
        else:
            row, column = (self._iota(axis, 2) for axis in (0, 1))
            eye = (row == column).astype(A_ref.dtype)
            P = jnp.broadcast_to(eye[None], (*shape, self.padded))
        P, q = lax.fori_loop(0, self.chunk, body, (P, q))
        self._store(P_ref, chunks, chunks < self.num_chunks, P)
        self._store(q_ref, chunks, chunks < self.num_chunks, q)

    def _evaluate(self, A_ref, b_ref, start_ref, out_ref):
        chunks = self._chunks()

        def body(i, x):
            A, b, (terms, exists) = self._terms(chunks, i, A_ref, b_ref)
            x = self._apply(A, x, b)
            self._store(out_ref, terms, exists, x)
            return x

        x = self._load(start_ref, chunks, chunks < self.num_chunks)
        lax.fori_loop(0, self.chunk, body, x)

    def _apply(self, A, x, b):
        if self.is_diagonal:
            return A * x + b
        return jnp.sum(A * x[:, None, :], axis=2) + b

    def _chunks(self):
        first = pl.program_id(0) * self.per_program
        return first + lax.iota(jnp.int32, self.per_program)

    def _terms(self, chunks, i, A_ref, b_ref):
        """The `i`th term of every chunk. The last chunk may be shorter. What is missing
        there is zero, which does no harm in either direction: either there is nothing
        before it, or nothing after it.
        """
        i = self.chunk - 1 - i if self.reverse else i
        terms = chunks * self.chunk + i
        exists = terms < self.length
        A = self._load(A_ref, terms, exists)
        return A, self._load(b_ref, terms, exists), (terms, exists)

    def _iota(self, axis, ndim):
        shape = [1] * ndim
        shape[axis] = self.padded
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def _index(self, ref, rows, exists):
        ndim = len(ref.shape)
        expand = lambda x: x.reshape(-1, *[1] * (ndim - 1))
        axes = [self._iota(axis, ndim) for axis in range(1, ndim)]
        mask = expand(exists)
        for axis in axes:
            mask = mask & (axis < self.size)
        return ref.at[(expand(rows), *axes)], mask

    def _load(self, ref, rows, exists):
        at, mask = self._index(ref, rows, exists)
        return plt.load(at, mask=mask, other=0)

    def _store(self, ref, rows, exists, values):
        at, mask = self._index(ref, rows, exists)
        plt.store(at, values, mask=mask)
