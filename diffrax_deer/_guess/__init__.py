from .auto import AutoGuess as AutoGuess
from .base import AbstractGuess as AbstractGuess
from .coarse import CoarseGuess as CoarseGuess
from .constant import ConstantGuess as ConstantGuess
from .extrapolation import ExtrapolationGuess as ExtrapolationGuess
from .nested import NestedGuess as NestedGuess
from .solution import SolutionGuess as SolutionGuess
