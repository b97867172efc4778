import dataclasses
from typing import Any

from .._window import Discretisation
from .base import AbstractGrid, Guess, Placed, Solve


class UniformGrid(AbstractGrid):
    """All substeps of a window are equally long."""

    @property
    def is_uniform(self) -> bool:
        return True

    def init(self, substeps: int, dtype: Any) -> tuple[None, None]:
        del substeps, dtype
        return None, None

    def place(self, problem: Discretisation, guess: Guess, solve: Solve) -> Placed:
        first, span = guess(problem)
        solution = solve(problem, first, None)
        return Placed(
            fractions=None,
            solution=dataclasses.replace(solution, span=solution.span + span),
            required_substeps=None,
            is_accurate=True,
        )


UniformGrid.__init__.__doc__ = """**Arguments:** None"""
