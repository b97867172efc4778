from .adaptive import AdaptiveGrid as AdaptiveGrid
from .base import AbstractGrid as AbstractGrid, Placed as Placed
from .uniform import UniformGrid as UniformGrid
