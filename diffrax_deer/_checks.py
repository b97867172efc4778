from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import AbstractSolver, LeapfrogMidpoint, ReversibleHeun
from jax.sharding import AxisType, NamedSharding

from ._custom_types import PyTree
from ._time_axis import num_parts


def check_optional_int(x: Any, name: str) -> None:
    if x is not None:
        check_positive_int(x, name)


def check_positive_int(x: Any, name: str) -> None:
    # A `bool` is an `int`, but not a number of anything.
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"`{name}` must be an integer of at least 1, got {x!r}.")
    if x < 1:
        raise ValueError(f"`{name}` must be at least 1, got {x}.")


def check_divides(x: int, size: int, name: str) -> None:
    if size % x != 0:
        raise ValueError(
            f"`{name}` must divide the size of the state, which consists of {size} "
            f"numbers, got {x}."
        )


def check_tolerance(x: Any, name: str) -> None:
    if _is_not_known(x):
        return
    if not _is_number(x):
        raise TypeError(f"`{name}` must be a positive number or `None`, got {x!r}.")
    if np.shape(x) != () or not x > 0:
        raise ValueError(
            f"`{name}` must be a positive number, got {x}. Use `None` for the default, "
            "which is tight."
        )


def check_damping(x: Any, name: str) -> None:
    if _is_not_known(x):
        return
    if not _is_number(x):
        raise TypeError(f"`{name}` must be a number or `None`, got {x!r}.")
    if np.shape(x) != () or not x >= 0:
        raise ValueError(
            f"`{name}` must not be negative, got {x}. Use `None` to have it chosen "
            "automatically."
        )


def _is_not_known(x):
    return x is None or isinstance(x, jax.core.Tracer)


def _is_number(x):
    is_number = isinstance(x, (int, float, np.number, np.ndarray, jax.Array))
    return is_number and not isinstance(x, bool)


def check_instance(x: Any, cls: type, name: str) -> None:
    if not isinstance(x, cls):
        msg = f"`{name}` must be an instance of `{cls.__name__}`, got {x!r}."
        if isinstance(x, type) and issubclass(x, cls):
            msg += f" Did you mean `{x.__name__}()`?"
        raise TypeError(msg)


def check_one_step_solver(solver: Any, name: str) -> None:
    check_instance(solver, AbstractSolver, name)
    for cls in (LeapfrogMidpoint, ReversibleHeun):
        if isinstance(solver, cls):
            raise ValueError(
                f"`{name}` must be a one-step method, got `{cls.__name__}`. Its step "
                "depends on the previous one as well as on the current value, and so "
                "cannot be solved for from the values on a grid. Use another solver, "
                "for example `diffrax.Midpoint()` or `diffrax.Heun()`."
            )


def check_state(y: PyTree, name: str) -> None:
    for leaf in jtu.tree_leaves(y):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"`{name}` must be floating point, got dtype {dtype}. Convert it with "
                "`.astype(float)`."
            )


def check_trajectory(ys: PyTree, y0: PyTree, length: int, message: str) -> None:
    """`ys` must be like `y0`, with a leading axis of this length on every leaf."""

    def form(x, *axes):
        x = jax.typeof(x)  # Python numbers, too.
        return jax.ShapeDtypeStruct((*axes, *x.shape), x.dtype)

    expected = jtu.tree_map(lambda y: form(y, length), y0)
    actual = jtu.tree_map(form, ys)
    if eqx.tree_equal(actual, expected) is not True:
        raise ValueError(f"{message} Expected\n{expected}\nbut got\n{actual}")


def check_sharding(x: Any, length: int, name: str) -> None:
    """For a time axis of this length."""
    if not isinstance(x, NamedSharding) or len(x.spec) != 1 or x.spec[0] is None:
        raise TypeError(
            f"`{name}` must say which axis of a mesh of devices the time axis is "
            "divided over, for example `jax.sharding.NamedSharding(mesh, "
            f'jax.sharding.PartitionSpec("time"))`, got {x}.'
        )
    if any(kind != AxisType.Auto for kind in x.mesh.axis_types):
        raise ValueError(
            f"`{name}` needs a mesh on which XLA finds out how everything else is "
            "divided: `jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto, "
            f"...))`, with one for each axis. Got {x.mesh.axis_types}."
        )
    parts = num_parts(x)
    if length % parts != 0:
        raise ValueError(
            f"`{name}` divides the time axis into {parts} parts, which must be of the "
            f"same length, but there are {length} substeps (or elements). Take a "
            f"multiple of {parts}."
        )
