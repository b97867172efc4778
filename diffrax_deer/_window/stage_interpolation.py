import dataclasses
import functools as ft
import itertools
import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractLocalInterpolation, AbstractSolver
from jaxtyping import Array, Float, Shaped

from .._custom_types import DenseInfo, PyTree, RealScalarLike
from .._interpolation import AbstractInterpolation
from .quadrature import which_are_read
from .tableau import Tableau, tableau_of


class StageInterpolation(AbstractInterpolation):
    """The interpolation of a Runge--Kutta method, if that is a linear function of all
    its stages.

    Diffrax multiplies matrices, for which XLA needs the stages of a step in an array of
    their own: one for each time, if there are many. Of a sum it makes a single loop,
    which reads them where they are.
    """

    t0: RealScalarLike
    t1: RealScalarLike
    dense_info: DenseInfo
    factory: "StageInterpolationFactory" = eqx.field(static=True)

    def at(self, t: RealScalarLike, left: bool) -> PyTree[Array]:
        del left
        weights = ft.cache(ft.partial(self._weights, t))

        def of_leaf(*stored):
            dtype = jnp.result_type(jnp.finfo(stored[0].dtype).dtype, t)
            pairs = zip(weights(dtype), stored)
            terms = [
                (operator.mul if w.ndim == 0 else _weighted)(w, x)
                for w, x in itertools.compress(pairs, self.factory.reads)
            ]
            return ft.reduce(operator.add, terms)

        structure = jtu.tree_structure(_example(self.factory.tableau))
        with jax.numpy_dtype_promotion("standard"):
            return jtu.tree_map(of_leaf, *structure.flatten_up_to(self.dense_info))

    def _weights(self, t, dtype):
        # By which all that is stored is multiplied.
        cls, tableau = self.factory.interpolation_cls, self.factory.tableau
        evaluate = lambda info: cls(t0=self.t0, t1=self.t1, **info).evaluate(t)
        transposed = jax.linear_transpose(evaluate, _example(tableau, dtype))
        (weights,) = transposed(jnp.ones((), dtype))
        return jtu.tree_leaves(weights)


# A dataclass rather than a closure, as Diffrax stores this as static information, which
# JAX then compares.
@dataclasses.dataclass(frozen=True)
class StageInterpolationFactory:
    interpolation_cls: Callable[..., AbstractLocalInterpolation]
    tableau: Tableau = dataclasses.field(repr=False)
    # Which of the stages and values that are stored it needs.
    reads: tuple[bool, ...]

    def __call__(self, *, t0, t1, **dense_info) -> StageInterpolation:
        return StageInterpolation(t0, t1, dense_info, self)


def interpolation_of(
    solver: AbstractSolver[Any],
) -> Callable[..., AbstractLocalInterpolation]:
    """What the solver interpolates its steps with, made for many times at once."""
    interpolation_cls, tableau = solver.interpolation_cls, tableau_of(solver)
    if tableau is None or not tableau.has_dense_stages:
        return interpolation_cls
    # One that somebody else has written need not be linear.
    package = interpolation_cls.__module__.split(".")[0]
    if package not in ("diffrax", __name__.split(".")[0]):
        return interpolation_cls
    return _of_stages(interpolation_cls, tableau)


@ft.cache
def _of_stages(interpolation_cls, tableau):
    make = lambda info: interpolation_cls(t0=0.0, t1=1.0, **info)
    evaluate = lambda info: make(info).evaluate(0.5)
    example = _example(tableau)
    # Otherwise it needs but a few of them, and is a sum already.
    if "dot_general" not in str(jax.make_jaxpr(evaluate)(example)):
        return interpolation_cls
    reads = which_are_read(evaluate, example)
    return StageInterpolationFactory(interpolation_cls, tableau, reads)


def _example(tableau: Tableau, dtype: Any = jnp.float32) -> dict[str, Any]:
    """What is stored of a step, if the state is a single number."""
    y = jax.ShapeDtypeStruct((), dtype)
    k = (jax.ShapeDtypeStruct((tableau.stages,), dtype),) * tableau.parts
    return dict(y0=y, y1=y, k=k if tableau.is_split else k[0])


@eqx.filter_custom_jvp
def _weighted(
    weights: Float[Array, " stages"], stages: Shaped[Array, "stages ..."]
) -> Shaped[Array, "..."]:
    return ft.reduce(operator.add, [w * k for w, k in zip(weights, stages)])


# Backwards, a sum has to be put together from as many arrays, and a product has not.
@_weighted.def_jvp
def _(primals, tangents):
    (weights, stages), (t_weights, t_stages) = primals, tangents
    product = ft.partial(jnp.tensordot, axes=1, precision=lax.Precision.HIGHEST)
    products = []
    if t_weights is not None:
        products.append(product(t_weights, stages))
    if t_stages is not None:
        products.append(product(weights, t_stages))
    return _weighted(weights, stages), ft.reduce(operator.add, products)
