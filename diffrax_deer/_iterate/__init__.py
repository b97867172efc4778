from .convergence import Convergence as Convergence
from .iteration import (
    Iteration as Iteration,
    JointSolution as JointSolution,
    State as State,
)
