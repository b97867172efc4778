import importlib.metadata

from ._adjoint import DeerAdjoint as DeerAdjoint
from ._collocation import (
    AbstractCollocation as AbstractCollocation,
    GaussLegendre as GaussLegendre,
    RadauIIA as RadauIIA,
)
from ._deer_scan import (
    deer_scan as deer_scan,
    deer_scan_solution as deer_scan_solution,
    ScanSolution as ScanSolution,
)
from ._diagnose import diagnose as diagnose, Report as Report
from ._grid import (
    AbstractGrid as AbstractGrid,
    AdaptiveGrid as AdaptiveGrid,
    UniformGrid as UniformGrid,
)
from ._guess import (
    AbstractGuess as AbstractGuess,
    AutoGuess as AutoGuess,
    CoarseGuess as CoarseGuess,
    ConstantGuess as ConstantGuess,
    ExtrapolationGuess as ExtrapolationGuess,
    NestedGuess as NestedGuess,
    SolutionGuess as SolutionGuess,
)
from ._method import (
    AbstractMethod as AbstractMethod,
    DEER as DEER,
    ELK as ELK,
    Jacobi as Jacobi,
    Picard as Picard,
    QuasiDEER as QuasiDEER,
    QuasiELK as QuasiELK,
)
from ._scan import (
    AbstractScan as AbstractScan,
    AssociativeScan as AssociativeScan,
    AutoScan as AutoScan,
    KernelScan as KernelScan,
    SequentialScan as SequentialScan,
)
from ._solver import DeerSolver as DeerSolver
from ._state import DeerState as DeerState
from ._window import (
    AbstractWindow as AbstractWindow,
    Discretisation as Discretisation,
    Iterate as Iterate,
)


__version__ = importlib.metadata.version("diffrax-deer")
