"""Whatever `diffeqsolve` takes, and what it must refuse."""

from typing import Any, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest
from diffrax import ODETerm, RESULTS
from diffrax_deer import (
    CoarseGuess,
    ConstantGuess,
    DEER,
    DeerAdjoint,
    DeerSolver,
    ELK,
    ExtrapolationGuess,
    GaussLegendre,
    Jacobi,
    KernelScan,
    NestedGuess,
    QuasiDEER,
    QuasiELK,
)

from .helpers import (
    deer,
    diffeqsolve,
    exact,
    max_error,
    over_time,
    problem,
    root_finder,
    SaveAt,
    sequential,
)


heun = DeerSolver(diffrax.Heun(), 8)


def _solve(vector_field, y0, solver: Any = heun, t0=0.0, t1=1.0, dt0=0.5, **kwargs):
    return diffeqsolve(ODETerm(vector_field), solver, t0, t1, dt0, y0, **kwargs)


def _last(sol):
    return jtu.tree_map(lambda y: y[-1], sol.ys)


def _decay(t, y, args):
    return jtu.tree_map(lambda y: -y * jnp.cos(t), y)


@pytest.mark.parametrize(
    "y0",
    (
        jnp.float64(1.0),
        jnp.array([1.0]),
        {"a": jnp.ones((2, 3)), "b": (jnp.array(2.0), jnp.ones(0))},
        (jnp.ones(2), None),
        jnp.ones((0,)),
        None,
    ),
    ids=("scalar", "one", "nested", "none-leaf", "empty", "none"),
)
def test_pytrees(y0):
    sol = _solve(_decay, y0, saveat=SaveAt(ts=jnp.linspace(0, 1, 5), t1=True))
    ref = sequential(ODETerm(_decay), diffrax.Heun(), np.linspace(0, 1, 17), y0)
    assert jtu.tree_structure(sol.ys) == jtu.tree_structure(ref.ys)
    assert max_error(_last(sol), _last(ref)) < 1e-10


def test_mixed_dtypes():
    y0 = {"low": jnp.ones(2, jnp.float32), "high": jnp.ones(3, jnp.float64)}
    t0, t1, dt0 = jnp.float32(0), jnp.float32(1), jnp.float32(0.5)

    def vector_field(t, y, args):
        low = -y["low"] * jnp.sum(y["high"]).astype(jnp.float32)
        return {"low": low, "high": -y["high"]}

    sol = _solve(vector_field, y0, t0=t0, t1=t1, dt0=dt0)
    # Diffrax's own Runge--Kutta solvers do not take this.
    ref = _solve(
        lambda t, y, args: {"low": -y["low"] * jnp.sum(y["high"]), "high": -y["high"]},
        jtu.tree_map(lambda y: y.astype(jnp.float64), y0),
    )
    assert sol.ys["low"].dtype == jnp.float32
    assert sol.ys["high"].dtype == jnp.float64
    assert max_error(sol.ys["low"], ref.ys["low"]) < 1e-5
    assert max_error(sol.ys["high"], ref.ys["high"]) < 1e-5


def test_weak_types_and_integers():
    # As in Diffrax, which turns integers into floating point numbers.
    ref = _solve(_decay, jnp.array(1.0)).ys
    for y0 in (1.0, 1, jnp.array(1)):
        sol = _solve(_decay, y0, t0=0, t1=1, dt0=0.5)
        assert sol.ys.dtype == jnp.float64
        assert max_error(sol.ys, ref) < 1e-12


def test_backwards_in_time():
    term, y0, args = problem()
    saveat = SaveAt(ts=jnp.linspace(1, -2, 7), dense=True)
    deer = diffeqsolve(
        term, DeerSolver(diffrax.Tsit5(), 8), 1, -2, -1.5, y0, args, saveat=saveat
    )
    ref = diffeqsolve(term, diffrax.Tsit5(), 1, -2, -1.5 / 8, y0, args, saveat=saveat)
    assert max_error(deer.ys, ref.ys) < 1e-10
    assert max_error(deer.evaluate(0.1), ref.evaluate(0.1)) < 1e-10
    assert max_error(deer.derivative(0.1), ref.derivative(0.1)) < 1e-8


def test_vmap():
    term, y0, args = problem()

    def solve(t0, t1, dt0, y0, args):
        return diffeqsolve(
            term,
            DeerSolver(diffrax.Tsit5(), 8),
            t0,
            t1,
            dt0,
            y0,
            args,
            stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-7),
        ).ys

    batch = (
        jnp.array([0.0, 0.5, -1.0]),
        jnp.array([1.0, -2.0, 4.0]),
        jnp.array([0.1, -0.3, 2.0]),
        y0 * jnp.array([[1.0], [-2.0], [0.1]]),
        args * jnp.array([1.0, 0.5, 2.0]),
    )
    batched, one = jax.jit(jax.vmap(solve))(*batch), jax.jit(solve)
    for i in range(3):
        assert max_error(batched[i], one(*(x[i] for x in batch))) < 1e-9


def test_one_failing_element_changes_no_other():
    def vector_field(t, y, args):
        return jnp.where(args, jnp.nan, -(y**2))

    @jax.jit
    @jax.vmap
    def solve(y0, fail):
        sol = _solve(vector_field, y0, args=fail, throw=False)
        return sol.ys, sol.result

    y0 = jnp.array([1.0, 2.0, 3.0])
    ys, result = solve(y0, jnp.array([False, True, False]))
    expected, _ = solve(y0, jnp.array([False, False, False]))
    assert jnp.array_equal(ys[::2], expected[::2])
    assert (result == RESULTS.successful).tolist() == [True, False, True]


def test_flags():
    # As strict as JAX can be, and that is when it traces.
    def trace(*args, size=2, **kwargs):
        solve = lambda y0: _solve(_decay, y0, *args, **kwargs).ys
        jax.make_jaxpr(solve)(jnp.ones(size))

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        trace(DeerSolver(diffrax.Tsit5(), 8))
        implicit = diffrax.ImplicitEuler(root_finder=root_finder)
        trace(DeerSolver(implicit, 8))
        # Of which the stages are found as a whole, for each component, or by modes.
        trace(DeerSolver(GaussLegendre(2), 8))
        trace(DeerSolver(GaussLegendre(2), 8, method=QuasiDEER()))
        trace(DeerSolver(GaussLegendre(2), 8), size=40)
        trace(diffrax.Tsit5(), adjoint=DeerAdjoint())
        for method, guess in (
            (ELK(), ConstantGuess()),
            (QuasiELK(), ConstantGuess()),
            (DEER(), ExtrapolationGuess()),
        ):
            trace(DeerSolver(diffrax.Heun(), 8, method=method, guess=guess))
        # With a component that the vector field does not read, and on several devices.
        term = ODETerm(lambda t, y, args: dict(y=-y["y"], cost=jnp.sum(y["y"] ** 2)))
        for sharding in (None, over_time(2)):
            solver = DeerSolver(
                diffrax.Tsit5(), 8, guess=ConstantGuess(), sharding=sharding
            )
            solve = lambda y0: (
                diffrax.diffeqsolve(
                    *(term, solver, 0.0, 1.0, 1.0, dict(y=y0, cost=jnp.array(0.0))),
                    adjoint=DeerAdjoint(),
                    max_steps=1,
                ).ys
            )
            jax.make_jaxpr(jax.jacrev(solve))(jnp.ones(2))


def test_loops_in_the_vector_field():
    def vector_field(t, y, args):
        cond_fun = lambda carry: carry[0] < 3
        body_fun = lambda carry: (carry[0] + 1, jnp.tanh(args * carry[1]))
        return jax.lax.while_loop(cond_fun, body_fun, (0, y))[1]

    @jax.jit
    @jax.jacfwd
    def jacobian(y0):
        adjoint = diffrax.ForwardMode()
        return _solve(vector_field, y0, args=0.9, adjoint=adjoint).ys

    y0 = jnp.array([1.0, 0.5])
    eps = 1e-6
    y1 = lambda y0: _solve(vector_field, y0, args=0.9).ys
    expected = (y1(y0.at[0].add(eps)) - y1(y0.at[0].add(-eps))) / (2 * eps)
    assert max_error(jacobian(y0)[..., 0], expected) < 1e-8


@jax.custom_vjp
def _sine(y):
    return -jnp.sin(y)


_sine.defvjp(lambda y: (_sine(y), y), lambda y, ct: (-ct * jnp.cos(y),))


def _custom_vjp(t, y, args):
    return _sine(y)


def _callback(t, y, args):
    sine = lambda y: -np.sin(y)
    return jax.pure_callback(sine, jax.typeof(y), y, vmap_method="expand_dims")


def _nested(t, y, args):
    return _solve(_decay, y, diffrax.Euler()).ys[-1] - y


@pytest.mark.parametrize(
    "vector_field,method",
    ((_custom_vjp, DEER()), (_callback, QuasiDEER()), (_nested, DEER())),
)
def test_no_forward_mode(vector_field, method):
    y0 = jnp.array([1.0, 0.5])
    with pytest.raises(TypeError, match="(?s)vector field.*forward mode.*Jacobi"):
        _solve(vector_field, y0, deer(diffrax.Heun(), 8, method=method))


@pytest.mark.parametrize("vector_field", (_custom_vjp, _callback))
@pytest.mark.parametrize(
    "solver",
    (
        heun,
        deer(diffrax.Heun(), 8, method=Jacobi()),
        # Coarser grids are solved in the same way.
        DeerSolver(diffrax.Heun(), 8, method=Jacobi(), guess=NestedGuess()),
    ),
    ids=("sequential", "jacobi", "nested"),
)
def test_no_jacobian_is_needed(vector_field, solver):
    y0 = jnp.array([1.0, 0.5])
    ref = _solve(lambda t, y, args: -jnp.sin(y), y0, diffrax.Heun(), dt0=1 / 16).ys
    assert max_error(_solve(vector_field, y0, solver).ys, ref) < 1e-10


def test_kernels_on_a_cpu():
    solver = DeerSolver(diffrax.Heun(), 8, guess=ConstantGuess(), scan=KernelScan())
    with pytest.raises(RuntimeError, match="`KernelScan.*AssociativeScan"):
        jax.block_until_ready(_solve(_decay, jnp.ones(2), solver))


def test_filter_jit_solver_argument():
    @eqx.filter_jit
    def solve(solver, y0):
        return _solve(_decay, y0, solver)

    solver = DeerSolver(diffrax.Heun(), 8, rtol=jnp.array(1e-8), atol=np.array(1e-10))
    assert max_error(solve(solver, 1.0).ys, solve(heun, 1.0).ys) < 1e-7


def test_stochastic():
    # Any grid has its own Brownian motion, but on this one both must be the same.
    key = jr.key(0)
    path = diffrax.VirtualBrownianTree(0.0, 1.0, tol=1e-3, shape=(2,), key=key)
    drift = lambda t, y, args: -jnp.sin(y)
    diffusion = lambda t, y, args: 0.5 * jnp.diag(jnp.cos(y))
    terms = diffrax.MultiTerm(ODETerm(drift), diffrax.ControlTerm(diffusion, path))
    y0 = jnp.array([1.0, -0.4])
    for solver in (diffrax.Euler(), diffrax.Heun()):
        deer = diffeqsolve(terms, DeerSolver(solver, 16), 0, 1, 0.5, y0)
        ref = sequential(terms, solver, np.linspace(0, 1, 33), y0)
        assert max_error(deer.ys, ref.ys) < 1e-10
    assert isinstance(DeerSolver(diffrax.Euler()), diffrax.AbstractItoSolver)


def test_controlled():
    ts = jnp.linspace(0, 1, 21)
    control = diffrax.LinearInterpolation(ts, jnp.stack([ts, jnp.sin(9 * ts)], axis=-1))
    term = diffrax.ControlTerm(
        lambda t, y, args: jnp.stack([y, jnp.cos(y)], axis=-1), control
    )
    y0 = jnp.array([1.0, -0.4])
    for terms in (term, term.to_ode()):
        deer = diffeqsolve(terms, DeerSolver(diffrax.Heun(), 20), 0, 1, 1, y0)
        ref = sequential(terms, diffrax.Heun(), np.linspace(0, 1, 21), y0)
        assert max_error(deer.ys, ref.ys) < 1e-10


def test_events():
    def vector_field(t, y, args):
        return jnp.stack([y[1], -y[0]])

    def solve(cond_fn, root_finder=None):
        return diffeqsolve(
            ODETerm(vector_field),
            DeerSolver(diffrax.Tsit5(), 8),
            0,
            10,
            0.25,
            jnp.array([1.0, 0.0]),
            event=diffrax.Event(cond_fn, root_finder),
        )

    crossing = lambda t, y, args, **kwargs: y[0]
    sol = solve(crossing, optx.Newton(1e-10, 1e-10))
    assert sol.result == RESULTS.event_occurred
    assert abs(sol.ts[-1] - jnp.pi / 2) < 1e-7
    # At the granularity of windows.
    sol = solve(lambda t, y, args, **kwargs: y[0] < 0)
    assert sol.ts[-1] == 1.75


@pytest.mark.parametrize("substeps", (0, -3))
def test_bad_substeps(substeps):
    with pytest.raises(ValueError, match="substeps"):
        DeerSolver(diffrax.Tsit5(), substeps)


@pytest.mark.parametrize("substeps", (2.0, "8", None, True, jnp.array(8)))
def test_substeps_not_an_integer(substeps):
    with pytest.raises(TypeError, match="substeps"):
        DeerSolver(diffrax.Tsit5(), substeps)


@pytest.mark.parametrize(
    "kwargs,error,match",
    (
        (dict(solver=3), TypeError, "solver=.*AbstractSolver"),
        (dict(solver=diffrax.Tsit5), TypeError, r"mean `Tsit5\(\)`"),
        (dict(solver=diffrax.LeapfrogMidpoint()), ValueError, "previous one"),
        (dict(solver=diffrax.ReversibleHeun()), ValueError, "previous one"),
        (
            dict(solver=diffrax.HalfSolver(diffrax.LeapfrogMidpoint())),
            ValueError,
            "previous one",
        ),
        (dict(solver=DeerSolver()), ValueError, "another `DeerSolver`"),
        (dict(rtol=0.0), ValueError, "rtol"),
        (dict(rtol="tight"), TypeError, "rtol"),
        (dict(atol=-1e-3), ValueError, "atol"),
        (dict(atol=float("nan")), ValueError, "atol"),
        (dict(max_iters=0), ValueError, "max_iters"),
        (dict(max_iters=1.5), TypeError, "max_iters"),
        (dict(method="deer"), TypeError, "method"),
        (dict(method=DEER), TypeError, r"mean `DEER\(\)`"),
        (dict(scan=None), TypeError, "scan"),
        (dict(guess=1.0), TypeError, "guess"),
        (dict(norm=2), TypeError, "norm"),
    ),
    ids=str,
)
def test_bad_arguments(kwargs, error, match):
    with pytest.raises(error, match=match):
        DeerSolver(**kwargs)


def test_bad_arguments_of_parts():
    with pytest.raises(ValueError, match=r"CoarseGuess\(steps"):
        CoarseGuess(steps=0)
    with pytest.raises(ValueError, match=r"CoarseGuess\(solver"):
        CoarseGuess(diffrax.ReversibleHeun())


@pytest.mark.filterwarnings("ignore:Complex dtype")
def test_complex_state():
    # Not holomorphic. (Diffrax's own Runge--Kutta solvers take no mixed dtypes.)
    def vector_field(t, y, args):
        z, x = y
        return (
            1j * args * z - 0.3 * jnp.conj(z) * x,
            jnp.sum(jnp.abs(z)) - x,
        )

    def value_and_gradient(y0, args, **kwargs: Any):
        def loss(y0, args):
            ts = jnp.array([0.3, 0.77, 1.0])
            z, x = _solve(
                vector_field, y0, args=args, saveat=SaveAt(ts=ts), **kwargs
            ).ys
            return jnp.sum(
                jnp.abs(z - 0.2) ** 2 + jnp.imag(z) * jnp.real(x)[:, None]
            ), (z, x)

        fn = jax.value_and_grad(loss, (0, 1), has_aux=True)
        return jax.jit(fn)(y0, args)

    y0 = (jnp.array([1 + 0.5j, 0.3 - 1j]), jnp.array(0.8 + 0j))
    direct, jointly = diffrax.DirectAdjoint(), DeerAdjoint()
    checkpointed = diffrax.RecursiveCheckpointAdjoint(checkpoints=4)
    results = []
    for solver, dt0, adjoint in (
        (diffrax.Heun(), 1 / 8, direct),
        (diffrax.Heun(), 1 / 8, jointly),
        (deer(diffrax.Heun(), 4), 1 / 2, checkpointed),
        (deer(diffrax.Heun(), 1), 1 / 8, jointly),
    ):
        kwargs: Any = dict(solver=solver, dt0=dt0, adjoint=adjoint, max_steps=8)
        results.append(value_and_gradient(y0, jnp.array(1.1 + 0.1j), **kwargs))
    for result in results[1:]:
        parts = lambda x: jtu.tree_map(lambda x: jnp.stack([x.real, x.imag]), x)
        assert max_error(parts(result), parts(results[0])) < 1e-9


def test_integer_state():
    # Which does not get here through `diffeqsolve`.
    with pytest.raises(TypeError, match="`y0` must be floating point"):
        heun.step(ODETerm(_decay), 0.0, 1.0, jnp.array(1), None, cast(Any, None), False)


def test_bad_solver_state():
    y0 = jnp.ones(3)
    saveat = SaveAt(t1=True, solver_state=True)
    state = _solve(_decay, y0, saveat=saveat).solver_state
    with pytest.raises(ValueError, match="solver_state"):
        _solve(_decay, jnp.ones(4), solver_state=state)
    with pytest.raises(ValueError, match="solver_state"):
        _solve(_decay, y0, DeerSolver(diffrax.Heun(), 9), solver_state=state)
    with pytest.raises(ValueError, match="solver_state"):
        _solve(_decay, y0, solver_state=(False, y0))


def test_no_error_estimate():
    y0 = jnp.ones(3)
    solver = DeerSolver(diffrax.Euler(), 8)
    assert _solve(_decay, y0, solver).result == RESULTS.successful
    with pytest.raises(RuntimeError, match="does not provide error estimates"):
        _solve(
            _decay,
            y0,
            solver,
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6),
        )


def _nan(t, y, args):
    return jnp.where(t > 0.3, jnp.nan, -y)


def _blow_up(t, y, args):
    return y**3


@pytest.mark.parametrize("vector_field", (_nan, _blow_up))
def test_nonfinite(vector_field):
    sol = _solve(vector_field, jnp.full(2, 9.0), throw=False)
    assert sol.result == RESULTS.nonfinite
    assert jnp.all(jnp.isfinite(sol.ys))
    with pytest.raises(eqx.EquinoxRuntimeError, match="[Nn]onfinite"):
        jax.block_until_ready(_solve(vector_field, jnp.full(2, 9.0)))


def test_nonfinite_adaptive():
    # Smaller windows do not help, and there is an end to trying.
    sol = _solve(
        _nan,
        jnp.ones(2),
        stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6),
        throw=False,
        max_steps=64,
    )
    assert sol.result == RESULTS.max_steps_reached


def test_not_converged():
    guess = ConstantGuess()
    solver = DeerSolver(diffrax.Tsit5(), 32, guess=guess, max_iters=4)
    term, y0, args = problem()

    def solve(**kwargs):
        return diffeqsolve(term, solver, 0, 6, 6, y0, args, **kwargs)

    sol = solve(throw=False)
    assert sol.result == RESULTS.nonlinear_max_steps_reached
    assert jnp.array_equal(sol.ys[-1], y0)
    with pytest.raises(eqx.EquinoxRuntimeError, match="nonlinear solver"):
        jax.block_until_ready(solve())
    # With an adaptive controller the window shrinks until it does.
    sol = solve(stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-8))
    assert sol.stats["num_rejected_steps"] > 0
    assert max_error(sol.ys, exact(term, 0, 6, y0, args).ys) < 1e-5


def test_failures_in_our_words():
    # Where we raise the error, that is, with `DeerAdjoint`.
    vector_field = lambda t, y, args: jnp.stack([y[1], args * y[1] - y[0] ** 3])
    solver = DeerSolver(diffrax.Tsit5(), 32, guess=ConstantGuess(), max_iters=2)

    @eqx.filter_jit
    def solve(y0, args):
        return _solve(
            *(vector_field, y0, solver, 0, 6, 6), args=args, adjoint=DeerAdjoint()
        ).ys

    y0, match = jnp.ones(2), "32 substeps, has not converged within `max_iters=2`"
    with pytest.raises(eqx.EquinoxRuntimeError, match=match):
        jax.block_until_ready(solve(y0, 0.1))
    with pytest.raises(eqx.EquinoxRuntimeError, match="32 substeps, has got nonfinite"):
        jax.block_until_ready(solve(y0, jnp.nan))
    with pytest.raises(eqx.EquinoxRuntimeError, match="y0=.*is not finite"):
        jax.block_until_ready(solve(y0 * jnp.nan, 0.1))
    with pytest.raises(TypeError, match=r"mean `DeerAdjoint\(\)`"):
        _solve(vector_field, y0, adjoint=cast(Any, DeerAdjoint), args=0.1)


def test_failure_of_the_wrapped_solver():
    # An implicit solver that is not allowed to iterate.
    root_finder = optx.Newton(rtol=1e-10, atol=1e-10)
    solver = diffrax.ImplicitEuler(root_finder=root_finder, root_find_max_steps=1)
    stiff = lambda t, y, args: -(y**3)
    # There is nothing to iterate on, if its stages are found jointly.
    sol = _solve(stiff, jnp.full(2, 3.0), DeerSolver(solver, 4), throw=False)
    assert sol.result == RESULTS.successful
    solver = diffrax.HalfSolver(solver)
    sol = _solve(stiff, jnp.full(2, 3.0), DeerSolver(solver, 4), throw=False)
    assert sol.result == RESULTS.nonlinear_max_steps_reached


def test_tolerances_of_a_root_finder():
    def solve(solver, dt0=0.5):
        return _last(_solve(lambda t, y, args: -(y**3), y0, solver, dt0=dt0))

    y0 = jnp.full(2, 3.0)
    with pytest.raises(ValueError, match="tolerances for the implicit"):
        solve(diffrax.Kvaerno3())
    # Where there is none, none are needed.
    precise = diffrax.Kvaerno3(root_finder=optx.Newton(rtol=1e-12, atol=1e-12))
    expected = solve(precise, dt0=0.125)
    for joint in (DeerSolver, deer):
        assert max_error(solve(joint(diffrax.Kvaerno3(), 4)), expected) < 1e-10


def test_all_tolerances_from_the_controller():
    # An implicit solver takes those of its root finder from there.
    term, y0, args = problem()
    ref = exact(term, 0, 2, y0, args)
    for solver in (diffrax.Kvaerno3(), DeerSolver(diffrax.Kvaerno3(), 8)):
        sol = diffeqsolve(
            term,
            solver,
            0,
            2,
            None,
            y0,
            args,
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-9),
        )
        assert sol.result == RESULTS.successful
        assert max_error(sol.ys, ref.ys) < 1e-5
