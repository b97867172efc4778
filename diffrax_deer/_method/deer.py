from typing import Literal

import equinox as eqx
from jaxtyping import Array, Float

from .._checks import check_jacobian
from .._window import AbstractWindow
from ._linearise import full_jacobians
from .base import AbstractUndampedMethod


class DEER(AbstractUndampedMethod):
    r"""DEER: the full Jacobian of every substep, that is, Newton's method for all of
    the window at once.

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

    jacobian: Literal["linear_ode", "exact"] = eqx.field(
        default="linear_ode", static=True
    )

    def __check_init__(self):
        check_jacobian(self.jacobian, "DEER(jacobian=...)")

    def linearise(
        self,
        window: AbstractWindow,
        ys: Float[Array, "substeps size"],
    ) -> Float[Array, "substeps size size"]:
        return full_jacobians(window, ys, exact=self.jacobian == "exact")


DEER.__init__.__doc__ = """**Arguments:**

- `jacobian`: how to linearise a substep. Either
    - `"linear_ode"`: linearise the differential equation, and integrate that over the
        substep. This takes one Jacobian of the vector field per substep, and then the
        matrix exponential: for implicit solvers itself, and for explicit Runge--Kutta
        methods the polynomial that these use in its place, so that both are stable at
        the same step sizes. For all other solvers, and if the equation is no ordinary
        differential equation, this is the same as `"exact"`.
    - `"exact"`: the Jacobian of the wrapped solver's step. This takes one Jacobian of
        the vector field for each of its stages.
"""
