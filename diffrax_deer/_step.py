from collections.abc import Callable
from typing import Any, cast, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import (
    AbstractERK,
    AbstractImplicitSolver,
    AbstractRungeKutta,
    AbstractSolver,
    AbstractSRK,
    AbstractTerm,
    ButcherTableau,
    MultiTerm,
    ODETerm,
    RESULTS,
)
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree, Real


class Substep(eqx.Module):
    """What one step of the wrapped solver returns. (Apart from its solver state.)"""

    y1: PyTree[Array]
    y_error: PyTree[Array] | None
    dense_info: dict[str, Any]
    result: RESULTS


class OneStepMap(eqx.Module):
    r"""The wrapped solver, as a map $(t_0, t_1, y_0) \mapsto y_1$.

    Vectors are the flattened state of the differential equation.
    """

    # `(t0, t1, y0) -> Substep`
    substep: Callable[..., Substep]
    # `(t, vector) -> vector`, if this is an ordinary differential equation
    vector_field: Callable | None
    # What the solver does to `dy/dt = J y`, as a function of `dt J`. Either "exact", if
    # close to its exponential, or the coefficients of a polynomial. `None` if unknown.
    exponential: Literal["exact"] | tuple[float, ...] | None
    unravel: Callable[[Float[Array, " size"]], PyTree]
    # The precision of the least precise leaf of the state.
    eps: float

    def __init__(
        self,
        solver: AbstractSolver,
        terms: PyTree[AbstractTerm],
        y0: PyTree[Array],
        args: PyTree[Any],
    ):
        """`y0` is only used for its structure, shapes and dtypes."""
        if _is_explicit_runge_kutta(solver):
            tableau = solver.tableau  # pyright: ignore[reportAttributeAccessIssue]
            substep = _explicit_runge_kutta(tableau, terms, args)
            self.exponential = _stability_polynomial(tableau)
        else:
            substep = _any_solver(solver, terms, args)
            is_implicit = isinstance(solver, AbstractImplicitSolver)
            self.exponential = "exact" if is_implicit else None
        # `jit` not for speed of execution but of tracing. The same substep occurs in
        # the residual, in its linearisations, in the output...
        self.substep = jax.jit(substep)
        _, self.unravel = ravel_pytree(y0)
        self.vector_field = (
            jax.jit(_vector_field(terms, args, self.unravel)) if is_ode(terms) else None
        )
        self.eps = precision(y0)

    def __call__(
        self, t0: Real[Array, ""], t1: Real[Array, ""], y0: Float[Array, " size"]
    ) -> Float[Array, " size"]:
        return self.ravel(self.substep(t0, t1, self.unravel(y0)).y1)

    def ravel(self, y: PyTree[Array]) -> Float[Array, " size"]:
        return ravel_pytree(y)[0]

    def substeps(
        self,
        t0s: Real[Array, " substeps"],
        t1s: Real[Array, " substeps"],
        starts: Float[Array, "substeps size"],
    ) -> Substep:
        """Many independent substeps, all at once: with a leading axis `substeps`."""

        def one(t0, t1, y0):
            return self.substep(t0, t1, self.unravel(y0))

        return jax.vmap(one)(t0s, t1s, starts)


def precision(y: PyTree[Array]) -> float:
    """That of the least precise leaf of a state, or zero if it has none."""
    leaves = jtu.tree_leaves(y)
    return max((float(jnp.finfo(leaf.dtype).eps) for leaf in leaves), default=0.0)


def is_ode(terms: PyTree[AbstractTerm]) -> bool:
    """Whether `terms` is an ordinary differential equation `dy/dt = f(t, y)`.

    This only decides how substeps are linearised, and so not what their solution is.
    """
    if isinstance(terms, MultiTerm):
        return all(is_ode(term) for term in terms.terms)
    elif isinstance(terms, AbstractTerm) and hasattr(terms, "term"):
        # Diffrax wraps terms to reverse time, and to solve their adjoint equation.
        return is_ode(terms.term)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        return type(terms) is ODETerm


def _vector_field(terms, args, unravel):
    def vector_field(t, y):
        # The control of an `ODETerm` is the time that passes. (Perhaps backwards.)
        unit_control = terms.contr(jnp.zeros_like(t), jnp.ones_like(t))
        return ravel_pytree(terms.vf_prod(t, unravel(y), args, unit_control))[0]

    return vector_field


def _is_explicit_runge_kutta(solver: AbstractSolver) -> bool:
    # Not `isinstance`: this is also true for solvers that wrap a Runge--Kutta method.
    # A subclass may also have changed what a step is.
    cls = type(solver)
    return (
        issubclass(cls, AbstractERK)
        and cls.step is AbstractRungeKutta.step
        and isinstance(cls.tableau, ButcherTableau)
    )


def _stability_polynomial(tableau: ButcherTableau) -> tuple[float, ...]:
    # `1 + b^T (I - z A)^{-1} 1 z`. See Hairer & Wanner, Solving Ordinary Differential
    # Equations II, section IV.2.
    A = np.zeros((tableau.num_stages, tableau.num_stages))
    for i, a in enumerate(tableau.a_lower):
        A[i + 1, : i + 1] = a
    coefficients = [1.0]
    power = np.ones(tableau.num_stages)
    for _ in range(tableau.num_stages):
        coefficients.append(float(tableau.b_sol @ power))
        power = A @ power
    while abs(coefficients[-1]) < 1e-12:  # The last stage of an FSAL method.
        coefficients.pop()
    return tuple(coefficients)


def _explicit_runge_kutta(tableau: ButcherTableau, terms, args):
    # Diffrax loops over the stages. Unrolled, XLA can fuse them, we can differentiate
    # them in both modes, and may skip those stages that are only needed for the error.
    cs = [tableau.c1, *tableau.c.tolist()]
    a_lower = [[], *(a.tolist() for a in tableau.a_lower)]

    def substep(t0, t1, y0):
        dt = t1 - t0
        control = terms.contr(t0, t1)
        # Many stages, one trace.
        vf_prod = jax.jit(lambda t, y: terms.vf_prod(t, y, args, control))

        def combine(coeffs, ks):
            coeffs__ks = [(c, k) for c, k in zip(coeffs, ks) if c != 0]
            if len(coeffs__ks) == 0:
                return jtu.tree_map(jnp.zeros_like, y0)
            coeffs, ks = zip(*coeffs__ks)
            return jtu.tree_map(lambda *k: sum(c * ki for c, ki in zip(coeffs, k)), *ks)

        def increment(coeffs, ks):
            return jtu.tree_map(jnp.add, y0, combine(coeffs, ks))

        ks = []
        for c, a in zip(cs, a_lower):
            t = t1 if c == 1 else t0 + c * dt
            ks.append(vf_prod(t, increment(a, ks)))
        y1 = increment(tableau.b_sol.tolist(), ks)
        y_error = combine(tableau.b_error.tolist(), ks)
        k = jtu.tree_map(lambda *k: jnp.stack(k), *ks)
        return Substep(y1, y_error, dict(y0=y0, y1=y1, k=k), RESULTS.successful)

    return substep


def _any_solver(solver: AbstractSolver, terms, args):
    solver = _jvp_compatible(solver)

    def substep(t0, t1, y0):
        # A one-step method has no memory: its state only ever caches what can be found
        # from `(t0, t1, y0)` as well. So each substep begins with a new one.
        state = solver.init(terms, t0, t1, y0, args)
        y1, y_error, dense_info, _, result = solver.step(
            terms, t0, t1, y0, args, state, made_jump=False
        )
        return Substep(y1, y_error, dense_info, result)

    return substep


def _jvp_compatible(solver: AbstractSolver) -> AbstractSolver:
    # Diffrax's default for the loop over stages cannot be differentiated in forward
    # mode, which is how Jacobians are computed.
    def fix(x):
        if not has_scan_kind(x):
            return x
        # Each of them understands only one of those that can.
        kind = "lax" if issubclass(type(x), AbstractSRK) else "bounded"
        is_none = lambda s: s is None
        return eqx.tree_at(lambda s: s.scan_kind, x, kind, is_leaf=is_none)

    # Of the class itself: `isinstance` is also true for solvers that wrap such a one.
    has_scan_kind = lambda x: issubclass(type(x), (AbstractRungeKutta, AbstractSRK))
    return cast(AbstractSolver, jtu.tree_map(fix, solver, is_leaf=has_scan_kind))
