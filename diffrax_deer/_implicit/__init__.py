from .linear import linear_solve as linear_solve
from .solution import (
    implicit_solution as implicit_solution,
    joint_solve as joint_solve,
    with_zeros as with_zeros,
    without_gradient as without_gradient,
)
