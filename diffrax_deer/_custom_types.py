from typing import Any, TYPE_CHECKING, TypeAlias

import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Int, PyTree, Real, Shaped


if TYPE_CHECKING:
    BoolScalarLike: TypeAlias = bool | Array | np.ndarray
    IntScalarLike: TypeAlias = int | Array | np.ndarray
    RealScalarLike: TypeAlias = bool | int | float | Array | np.ndarray
else:
    BoolScalarLike = Bool[ArrayLike, ""]
    IntScalarLike = Int[ArrayLike, ""]
    RealScalarLike = Real[ArrayLike, ""]

Y: TypeAlias = PyTree[Shaped[ArrayLike, "?*y"], "Y"]
VF: TypeAlias = PyTree[Shaped[ArrayLike, "?*vf"], "VF"]
Args: TypeAlias = PyTree[Any]
DenseInfo: TypeAlias = dict[str, PyTree[Array]]
