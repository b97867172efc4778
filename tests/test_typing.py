"""Annotations of shapes are right, and do not get into the way of checking them."""

import subprocess
import sys


script = """
import jaxtyping

with jaxtyping.install_import_hook("diffrax_deer", "beartype.beartype"):
    import diffrax_deer

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix

def vector_field(t, y, args):
    return {"a": -y["b"], "b": y["a"], "cost": jnp.sum(y["a"])}

def solve(y0, solver, controller, adjoint):
    saveat = diffrax.SaveAt(
        t1=True, ts=jnp.array([0.3]), steps=True, dense=True, solver_state=True
    )
    event = diffrax.Event(
        lambda t, y, args, **kwargs: jnp.sum(y["a"]) + 1, optimistix.Newton(1e-5, 1e-5)
    )
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        solver,
        0,
        1,
        0.1,
        y0,
        saveat=saveat,
        stepsize_controller=controller,
        adjoint=adjoint,
        event=event,
        max_steps=16,
    )
    return jnp.sum(sol.ys["a"][0])

y0 = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3)), "cost": jnp.ones(())}
pid = diffrax.PIDController(rtol=1e-3, atol=1e-3)
clip = diffrax.ClipStepSizeController(pid, jump_ts=[0.5])
constant = diffrax.ConstantStepSize()
four = diffrax_deer.DeerSolver(substeps=4)
single = diffrax_deer.DeerSolver(substeps=1)
grid = diffrax_deer.AdaptiveGrid(rtol=1e-3, atol=1e-3)
moving = diffrax_deer.DeerSolver(substeps=4, grid=grid)
for args in (
    (four, pid, diffrax.DirectAdjoint()),
    (four, clip, diffrax_deer.DeerAdjoint()),
    (single, constant, diffrax_deer.DeerAdjoint(max_window_points=4)),
    (moving, pid, diffrax_deer.DeerAdjoint()),
):
    # Annotations are checked when functions are traced.
    print(eqx.filter_eval_shape(jax.grad(solve), y0, *args))
"""


def test_runtime_type_checking():
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
