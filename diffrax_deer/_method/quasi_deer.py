from typing import Literal

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_jacobian, check_positive_int
from .._window import AbstractWindow
from ._linearise import diagonal_jacobians
from .base import AbstractUndampedMethod


class QuasiDEER(AbstractUndampedMethod):
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

    jacobian: Literal["linear_ode", "exact"] = eqx.field(
        default="linear_ode", static=True
    )
    samples: int | None = eqx.field(default=None, static=True)
    key: PRNGKeyArray | None = None

    def __check_init__(self):
        check_jacobian(self.jacobian, "QuasiDEER(jacobian=...)")
        if self.samples is not None:
            check_positive_int(self.samples, "QuasiDEER(samples=...)")

    def linearise(
        self, window: AbstractWindow, ys: Float[Array, "substeps size"]
    ) -> Float[Array, "substeps size"]:
        return diagonal_jacobians(
            window,
            ys,
            exact=self.jacobian == "exact",
            samples=self.samples,
            key=jr.key(0) if self.key is None else self.key,
        )


QuasiDEER.__init__.__doc__ = """**Arguments:**

- `jacobian`: how to linearise a substep, as for [`diffrax_deer.DEER`][].
- `samples`: if `None`, then the diagonals are exact, which takes as many
    Jacobian-vector products as the state has components, one after the other. Otherwise
    they are estimated from this many of them, by Hutchinson's method.
- `key`: the random key for these estimates. Defaults to `jax.random.key(0)`.
"""
