from .convergence import Convergence as Convergence
from .in_turn import solve_in_turn as solve_in_turn
from .iteration import (
    Iteration as Iteration,
    JointSolution as JointSolution,
    State as State,
)
