from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters import partial_eval as pe

from ._custom_types import PyTree


def inputs_read(fn: Callable[..., PyTree[Any]], *args: PyTree[Any]) -> tuple[bool, ...]:
    """Which leaves of its arguments the values of a function may depend on."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    _, reads = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return tuple(reads)
