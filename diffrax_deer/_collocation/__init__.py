from .base import AbstractCollocation as AbstractCollocation
from .gauss_legendre import GaussLegendre as GaussLegendre
from .radau_iia import RadauIIA as RadauIIA
