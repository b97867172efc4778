from typing import Any, TypeVar

from diffrax import AbstractWrappedSolver

from ._custom_types import Args, RealScalarLike, Terms, VF, Y


_SolverState = TypeVar("_SolverState")


class AbstractForwardingSolver(AbstractWrappedSolver[_SolverState]):
    """Abstract base class for solvers that are what they wrap, but for their steps.

    As Diffrax forwards `isinstance` checks to the wrapped solver, so must be the
    attributes that it then expects.
    """

    @property
    def term_structure(self) -> Any:
        return self.solver.term_structure

    @property
    def term_compatible_contr_kwargs(self) -> Any:
        return self.solver.term_compatible_contr_kwargs

    @property
    def scan_kind(self) -> Any:
        return self.solver.scan_kind  # pyright: ignore

    @property
    def root_finder(self) -> Any:
        return self.solver.root_finder  # pyright: ignore

    @property
    def root_find_max_steps(self) -> int:
        return self.solver.root_find_max_steps  # pyright: ignore

    def order(self, terms: Terms) -> int | None:
        return self.solver.order(terms)

    def strong_order(self, terms: Terms) -> RealScalarLike | None:
        return self.solver.strong_order(terms)

    def func(self, terms: Terms, t0: RealScalarLike, y0: Y, args: Args) -> VF:
        return self.solver.func(terms, t0, y0, args)
