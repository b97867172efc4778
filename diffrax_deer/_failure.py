"""Failures in words of our own.

Diffrax's loop only takes its own `RESULTS`, whose messages are about its own steps and
root finders. So these are for where we raise the error ourselves.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool


def error_if_any(token: Any, errors: list[tuple[Bool[Array, ""], str]]) -> Any:
    """The first of these errors that there is."""
    failures = jnp.stack([failure for failure, _ in errors])
    messages = [message for _, message in errors]
    return eqx.branched_error_if(
        token, jnp.any(failures), jnp.argmax(failures), messages
    )
