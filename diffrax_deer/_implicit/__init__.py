from .linear import linear_solve as linear_solve
from .solution import (
    Chunks as Chunks,
    implicit_solution as implicit_solution,
    joint_solve as joint_solve,
    without_gradient as without_gradient,
)
