from typing import Any, TYPE_CHECKING, TypeAlias

from jaxtyping import Array, ArrayLike, Bool, Int, PyTree, Real, Shaped


if TYPE_CHECKING:
    BoolScalarLike: TypeAlias = bool | Array
    IntScalarLike: TypeAlias = int | Array
    RealScalarLike: TypeAlias = bool | int | float | Array
else:
    BoolScalarLike = Bool[ArrayLike, ""]
    IntScalarLike = Int[ArrayLike, ""]
    RealScalarLike = Real[ArrayLike, ""]

Y: TypeAlias = PyTree[Shaped[ArrayLike, "?*y"], "Y"]
VF: TypeAlias = PyTree[Shaped[ArrayLike, "?*vf"], "VF"]
Args: TypeAlias = PyTree[Any]
DenseInfo: TypeAlias = dict[str, PyTree[Array]]
