from .deer_adjoint import DeerAdjoint as DeerAdjoint
