import abc
from typing import TypeAlias

import equinox as eqx
from jaxtyping import Array, Float


# Either full matrices or diagonal ones.
Matrices: TypeAlias = Float[Array, "substeps size size"] | Float[Array, "substeps size"]


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

    @abc.abstractmethod
    def damped(
        self, A: Matrices, b: Float[Array, "substeps size"], damping: Float[Array, ""]
    ) -> Float[Array, "substeps size"]:
        r"""Evaluate a linear recurrence that is being pulled towards zero.

        This is the Kalman filter for $x_{n+1} = A_n x_n + b_n + v_n$ from $x_0 = 0$,
        with noise $v_n$ of unit covariance, given that all $x_n$ have been observed to
        be zero with a noise of covariance $1 / \texttt{damping}$.

        **Arguments:**

        - `A`, `b`: as above.
        - `damping`: not negative. If zero, then this is the linear recurrence itself.

        **Returns:**

        The means of the filtered distributions of $x_1, \ldots, x_N$.
        """
