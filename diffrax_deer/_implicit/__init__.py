from .linear import (
    differentiates_in_turn as differentiates_in_turn,
    share_read as share_read,
)
from .solution import (
    as_known as as_known,
    implicit_solution as implicit_solution,
    with_derivative as with_derivative,
    without_gradient as without_gradient,
)
