import equinox as eqx
from jaxtyping import PRNGKeyArray

from .._checks import check_optional_int, check_positive_int
from .base import AbstractUndampedMethod
from .linearisation import AbstractDiagonalMethod


class QuasiDEER(AbstractDiagonalMethod, AbstractUndampedMethod):
    r"""Quasi-DEER: only the diagonals of the Jacobians, or only small blocks.

    This takes $O(N d)$ memory for $N$ substeps of a $d$-dimensional state, where
    [`diffrax_deer.DEER`][] takes $O(N d^2)$, and no $O(N d^3)$ work, at the price of
    more iterations. It suits large states whose components depend most on themselves.

    Where this is true of pairs or other small groups of components, take these for
    blocks. Positions depend on momenta and momenta on positions, for example, so that
    the diagonals of the Jacobians are zero.

    !!! example

        ```python
        def pendulums(t, y, args):
            q, p = y  # two arrays of the same shape
            return p, -jnp.sin(q) + 0.1 * (jnp.roll(q, 1) - q)

        DeerSolver(Tsit5(), method=QuasiDEER(samples=1, block=2))
        ```

    ??? cite "Reference"

        ```bibtex
        @inproceedings{gonzalez2024towards,
            author={Gonzalez, Xavier and Warrington, Andrew and Smith, Jimmy T.H. and
                    Linderman, Scott W.},
            title={Towards Scalable and Stable Parallelization of Nonlinear {RNN}s},
            booktitle={Advances in Neural Information Processing Systems},
            year={2024},
        }
        ```
    """

    samples: int | None = eqx.field(default=None, static=True)
    key: PRNGKeyArray | None = None
    block: int = eqx.field(default=1, static=True)

    def __check_init__(self) -> None:
        check_optional_int(self.samples, "QuasiDEER(samples=...)")
        check_positive_int(self.block, "QuasiDEER(block=...)")


QuasiDEER.__init__.__doc__ = """**Arguments:**

- `samples`: if `None`, then the diagonals are exact, which takes as many
    Jacobian-vector products as the state has components, one after the other. Otherwise
    they are estimated from this many of them, by Hutchinson's method. A single one is
    exact if the components (or blocks) do not depend on each other at all.
- `key`: the random key for these estimates. Defaults to `jax.random.key(0)`.
- `block`: how many components belong together. The state consists of this many arrays
    of the same shape, one after the other: these are the leaves of a PyTree, or lie
    along the first axis of a single array. What is at the same place in all of them is
    a block. So it is 2 for a state `(q, p)`, and also for a complex array, of which the
    real and the imaginary parts are such arrays. Blocks take `block` times the memory
    of diagonals, and as many Jacobian-vector products at once where these take one.
"""
