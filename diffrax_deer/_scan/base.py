import abc

import equinox as eqx
from jaxtyping import Array, Float

from .._linear_algebra import Matrices


class AbstractScan(eqx.Module):
    """Abstract base class for all ways to evaluate a linear recurrence."""

    @abc.abstractmethod
    def __call__(
        self,
        A: Matrices,
        b: Float[Array, "substeps size"],
        *,
        reverse: bool = False,
    ) -> Float[Array, "substeps size"]:
        r"""Evaluate a linear recurrence from a zero initial value.

        **Arguments:**

        - `A`: the matrices $A_0, \ldots, A_{N-1}$. Those that are diagonal may be
            given as vectors.
        - `b`: the inhomogeneities $b_0, \ldots, b_{N-1}$.
        - `reverse`: the direction, see below.

        **Returns:**

        With `reverse=False`, the values $x_1, \ldots, x_N$ of
        $x_{n+1} = A_n x_n + b_n$ with $x_0 = 0$.

        With `reverse=True`, the values $x_0, \ldots, x_{N-1}$ of
        $x_n = A_n x_{n+1} + b_n$ with $x_N = 0$.
        """
