from .base import AbstractMethod as AbstractMethod
from .damping import AbstractDampedMethod as AbstractDampedMethod
from .deer import DEER as DEER
from .elk import ELK as ELK, QuasiELK as QuasiELK
from .jacobi import Jacobi as Jacobi
from .linearisation import AbstractFullMethod as AbstractFullMethod
from .picard import Picard as Picard
from .quasi_deer import QuasiDEER as QuasiDEER
