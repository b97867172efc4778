import dataclasses
import functools as ft
from typing import Any

import numpy as np
from diffrax import (
    AbstractRungeKutta,
    ButcherTableau,
    ImplicitEuler,
    MultiButcherTableau,
)

from .._collocation import AbstractCollocation


# Compared by identity, for the sake of JAX: there is one for each kind of solver.
@dataclasses.dataclass(frozen=True, eq=False)
class Tableau:
    """A Butcher tableau for each part of a differential equation.

    All arrays have a leading axis for the parts, of which there are several only for
    IMEX methods.
    """

    A: np.ndarray
    b: np.ndarray
    b_error: np.ndarray
    c: np.ndarray
    # Whether there is a term for each part, rather than a single term.
    is_split: bool = False
    # Whether the solver interpolates from its stages.
    has_dense_stages: bool = True

    @property
    def parts(self) -> int:
        return self.A.shape[0]

    @property
    def stages(self) -> int:
        return self.A.shape[1]

    @property
    def is_explicit(self) -> bool:
        return not np.triu(self.A).any()

    @ft.cached_property
    def is_unknown(self) -> np.ndarray:
        """Which stages have to be solved for. All others are only there for an error
        estimate or for dense output, and follow from these."""

        def with_theirs(which):
            for _ in range(self.stages):
                which = which | (self.A[:, which] != 0).any((0, 1))
            return which

        matters = with_theirs((self.b != 0).any(0))
        # Each by itself: none that depends on others of its kind.
        return with_theirs(matters | (self.A[:, :, ~matters] != 0).any((0, 2)))

    @ft.cached_property
    def core(self) -> "Tableau":
        """The same, without stages that do not have to be solved for."""
        i = np.flatnonzero(self.is_unknown)
        return self if len(i) == self.stages else self._only(i)

    @ft.cached_property
    def middle(self) -> tuple[int, "Tableau"]:
        """Which stage is closest to the middle of a step, and that one alone."""
        index = int(np.argmin(abs(self.c[0] - 0.5)))
        return index, self._only([index])

    def _only(self, i):
        return dataclasses.replace(
            self,
            A=self.A[:, i][:, :, i],
            b=self.b[:, i],
            b_error=self.b_error[:, i],
            c=self.c[:, i],
        )

    @property
    def is_fsal(self) -> bool:
        """Whether all that does not have to be solved for is the evaluation that a step
        ends, and the next one begins with ("first same as last")."""
        others = np.flatnonzero(~self.is_unknown)
        begins = not self.A[:, 0].any() and not self.c[:, 0].any()
        ends = (self.A[:, -1] == self.b).all() and (self.c[:, -1] == 1).all()
        return bool(list(others) == [self.stages - 1] and begins and ends)

    @property
    def is_diagonally_implicit(self) -> bool:
        return not np.triu(self.A, 1).any()


@ft.cache
def _from_diffrax(cls: type) -> Tableau:
    tableau: Any = cls.tableau
    is_split = isinstance(tableau, MultiButcherTableau)
    parts = tableau.tableaus if is_split else (tableau,)
    return Tableau(
        A=np.stack([_square(part) for part in parts]),
        b=np.stack([part.b_sol for part in parts]),
        b_error=np.stack([part.b_error for part in parts]),
        c=np.stack([np.concatenate([[part.c1], part.c]) for part in parts]),
        is_split=is_split,
    )


def _square(part: ButcherTableau) -> np.ndarray:
    A = np.zeros((part.num_stages, part.num_stages))
    for i, row in enumerate(part.a_lower):
        A[i + 1, : i + 1] = row
    if part.a_diagonal is not None:
        A += np.diag(part.a_diagonal)
    return A


# Diffrax implements this one by hand. The first stage only serves to estimate errors.
_implicit_euler = Tableau(
    A=np.array([[[0.0, 0.0], [0.0, 1.0]]]),
    b=np.array([[0.0, 1.0]]),
    b_error=np.array([[-0.5, 0.5]]),
    c=np.array([[0.0, 1.0]]),
    has_dense_stages=False,
)


@ft.cache
def _from_collocation(cls: type, stages: int) -> Tableau:
    A, b, c, b_error = cls.coefficients(stages)
    return Tableau(A[None], b[None], b_error[None], c[None])


def tableau_of(solver: Any) -> Tableau | None:
    """The tableau of a Runge--Kutta method, and `None` for any other solver."""
    # Not `isinstance`: this is also true for solvers that wrap a Runge--Kutta method.
    # A subclass may also have changed what a step is.
    cls = type(solver)
    if issubclass(cls, AbstractRungeKutta) and cls.step is AbstractRungeKutta.step:
        return _from_diffrax(cls)
    elif issubclass(cls, ImplicitEuler) and cls.step is ImplicitEuler.step:
        return _implicit_euler
    elif issubclass(cls, AbstractCollocation) and (
        cls.step is AbstractCollocation.step
    ):
        return _from_collocation(cls, solver.stages)
    else:
        return None
