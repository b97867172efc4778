import equinox as eqx
import numpy as np
import optimistix as optx

from .._checks import check_positive_int
from .._custom_types import RootFinder, Terms
from .base import AbstractCollocation


class GaussLegendre(AbstractCollocation):
    r"""Gauss--Legendre collocation.

    Of order `2 * stages`, the highest that there is for this number of stages.
    A-stable, symplectic, symmetric, and so suited to Hamiltonian systems and other
    oscillations. Its error estimate is that of an embedded quadrature, of order
    `stages`. (In [`diffrax_deer.DeerSolver`][] with an even number of `substeps` it is
    the difference to the solution on half of them, of the full order.) Uses a
    polynomial of degree `stages` for dense output.

    ??? cite "Reference"

        ```bibtex
        @book{hairer2006geometric,
            author={Hairer, Ernst and Lubich, Christian and Wanner, Gerhard},
            title={Geometric Numerical Integration},
            publisher={Springer},
            year={2006},
            note={Section II.1.3},
        }
        ```
    """

    stages: int = eqx.field(default=4, static=True)
    root_finder: RootFinder = optx.Newton(rtol=1e-6, atol=1e-9)
    root_find_max_steps: int = 20

    def __check_init__(self) -> None:
        check_positive_int(self.stages, "GaussLegendre(stages=...)")

    @staticmethod
    def nodes(stages: int) -> np.ndarray:
        x, _ = np.polynomial.legendre.leggauss(stages)
        return (x + 1) / 2

    def order(self, terms: Terms) -> int:
        del terms
        return 2 * self.stages


GaussLegendre.__init__.__doc__ = """**Arguments:**

- `stages`: the number of stages. A positive integer. A single one is the implicit
    midpoint rule, which has no error estimate.
- `root_finder`: an [Optimistix](https://github.com/patrick-kidger/optimistix) root
    finder to solve for all stages of a step.
- `root_find_max_steps`: the maximum number of steps that the root finder is allowed to
    make before the step is rejected.
"""
