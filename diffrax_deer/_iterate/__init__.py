from .convergence import Convergence as Convergence
from .iteration import (
    Iteration as Iteration,
    JointSolution as JointSolution,
    known_solution as known_solution,
    State as State,
)
