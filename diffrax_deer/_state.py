import equinox as eqx
from jaxtyping import Array, Int, Real

from ._custom_types import PyTree


class DeerState(eqx.Module):
    """The state of [`diffrax_deer.DeerSolver`][], as is returned by
    `diffeqsolve(..., saveat=SaveAt(solver_state=True))` and accepted by
    `diffeqsolve(..., solver_state=...)`.

    It is a first guess, and not differentiable.

    **Attributes:**

    - `t0`, `t1`: the last window. (Both negated if integrating backwards in time.) NaN
        before the first one.
    - `ys`: the trajectory over the last window, at the ends of its substeps. A PyTree
        like the state of the differential equation, with an additional leading axis of
        size `substeps` on every leaf, and with `None` for leaves that the vector field
        does not read.
    - `num_iterations`: the number of iterations made to find it. An integer. (If one
        substep was solved after the other, of the one that took the most.)
    - `sequential_evaluations`: how many evaluations of the vector field, or of its
        derivative, followed one another to find it. (Of a solver that is no
        Runge--Kutta method, how many steps.) An integer.
    - `fractions`: with [`diffrax_deer.AdaptiveGrid`][], when the substeps of the last
        window begin and end, from 0 to 1. Of shape `(substeps + 1,)`. `None` if they
        are equally long.
    - `required_substeps`: with `AdaptiveGrid(rtol=..., atol=...)`, how many substeps it
        takes to solve the last window with this tolerance. An integer. `None` if there
        is no tolerance.
    """

    t0: Real[Array, ""]
    t1: Real[Array, ""]
    ys: PyTree[Array]
    num_iterations: Int[Array, ""]
    sequential_evaluations: Int[Array, ""]
    fractions: Real[Array, " substeps_plus_1"] | None = None
    required_substeps: Int[Array, ""] | None = None
