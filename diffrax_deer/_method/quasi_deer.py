import equinox as eqx
from jaxtyping import PRNGKeyArray

from .._checks import check_positive_int
from .base import AbstractUndampedMethod
from .linearisation import AbstractDiagonalMethod


class QuasiDEER(AbstractDiagonalMethod, AbstractUndampedMethod):
    r"""Quasi-DEER: only the diagonals of the Jacobians.

    This takes $O(N d)$ memory for $N$ substeps of a $d$-dimensional state, where
    [`diffrax_deer.DEER`][] takes $O(N d^2)$, and no $O(N d^3)$ work, at the price of
    more iterations. It suits large states whose components depend most on themselves.

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

    def __check_init__(self) -> None:
        if self.samples is not None:
            check_positive_int(self.samples, "QuasiDEER(samples=...)")


QuasiDEER.__init__.__doc__ = """**Arguments:**

- `samples`: if `None`, then the diagonals are exact, which takes as many
    Jacobian-vector products as the state has components, one after the other. Otherwise
    they are estimated from this many of them, by Hutchinson's method.
- `key`: the random key for these estimates. Defaults to `jax.random.key(0)`.
"""
