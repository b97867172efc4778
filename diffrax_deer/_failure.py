"""Failures in words of our own.

Diffrax's loop only takes its own `RESULTS`, whose messages are about its own steps and
root finders. So these are for where we raise the error ourselves.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from diffrax import RESULTS
from jaxtyping import Array, Bool


# Inherited, which type checkers take for another class. (And to promote one of
# Optimistix's takes longer than to trace an iteration.)
NONFINITE: Any = RESULTS.nonfinite
TOO_MANY_ITERATIONS: Any = RESULTS.nonlinear_max_steps_reached


def error_if_any(token: Any, errors: list[tuple[Bool[Array, ""], str]]) -> Any:
    """The first of these errors that there is."""
    failures = jnp.stack([failure for failure, _ in errors])
    messages = [message for _, message in errors]
    return eqx.branched_error_if(
        token, jnp.any(failures), jnp.argmax(failures), messages
    )
