import equinox as eqx
import numpy as np
import optimistix as optx

from .._checks import check_positive_int
from .._custom_types import RootFinder, Terms
from .base import AbstractCollocation


class RadauIIA(AbstractCollocation):
    r"""Radau IIA collocation.

    Of order `2 * stages - 1`. L-stable and stiffly accurate, and so suited to stiff
    problems. Its error estimate is that of an embedded quadrature, of order `stages`.
    (In [`diffrax_deer.DeerSolver`][] with an even number of `substeps` it is the
    difference to the solution on half of them, of the full order.) Uses a polynomial of
    degree `stages` for dense output.

    ??? cite "Reference"

        ```bibtex
        @book{hairer1996solving,
            author={Hairer, Ernst and Wanner, Gerhard},
            title={Solving Ordinary Differential Equations {II}},
            publisher={Springer},
            year={1996},
            note={Section IV.5},
        }
        ```
    """

    stages: int = eqx.field(default=3, static=True)
    root_finder: RootFinder = optx.Newton(rtol=1e-6, atol=1e-9)
    root_find_max_steps: int = 20

    def __check_init__(self) -> None:
        check_positive_int(self.stages, "RadauIIA(stages=...)")

    @staticmethod
    def nodes(stages: int) -> np.ndarray:
        # Where the Legendre polynomials of degrees `stages` and `stages - 1` are equal.
        series = np.zeros(stages + 1)
        series[-2:] = -1, 1
        nodes = (np.polynomial.legendre.legroots(series) + 1) / 2
        # The last one is the end of the step, up to a rounding error.
        return np.append(np.sort(nodes)[:-1], 1.0)

    def order(self, terms: Terms) -> int:
        del terms
        return 2 * self.stages - 1


RadauIIA.__init__.__doc__ = """**Arguments:**

- `stages`: the number of stages. A positive integer. A single one is the implicit Euler
    method, which has no error estimate.
- `root_finder`: an [Optimistix](https://github.com/patrick-kidger/optimistix) root
    finder to solve for all stages of a step.
- `root_find_max_steps`: the maximum number of steps that the root finder is allowed to
    make before the step is rejected.
"""
