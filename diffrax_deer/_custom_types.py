from typing import Any, TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import optimistix as optx
from diffrax import AbstractTerm
from jaxtyping import Array, ArrayLike, Bool, Int, Real, Shaped


if TYPE_CHECKING:
    from typing_extensions import TypeAliasType

    BoolScalarLike: TypeAlias = bool | Array | np.ndarray
    IntScalarLike: TypeAlias = int | Array | np.ndarray
    RealScalarLike: TypeAlias = bool | int | float | Array | np.ndarray

    # Of jaxtyping's own, type checkers say that its type is not known.
    PyTree = TypeAliasType("PyTree", Any, type_params=(TypeVar("T"),))
    Terms: TypeAlias = Any
    Y: TypeAlias = Any
    VF: TypeAlias = Any
    Stages: TypeAlias = Any
else:
    from jaxtyping import PyTree

    BoolScalarLike = Bool[ArrayLike, ""]
    IntScalarLike = Int[ArrayLike, ""]
    RealScalarLike = Real[ArrayLike, ""]

    Terms = PyTree[AbstractTerm]
    Y = PyTree[Shaped[ArrayLike, "?*y"], "Y"]
    VF = PyTree[Shaped[ArrayLike, "?*vf"], "VF"]
    Stages = PyTree[Shaped[Array, "stages ?*y"], "Y"]

Args: TypeAlias = PyTree[Any]
RootFinder: TypeAlias = optx.AbstractRootFinder[Any, Any, Any, Any]
DenseInfo: TypeAlias = dict[str, PyTree[Array]]
