"""Annotations of shapes are right, and do not get into the way of checking them."""

import subprocess
import sys


script = """
import jaxtyping

with jaxtyping.install_import_hook("diffrax_deer", "beartype.beartype"):
    import diffrax_deer

import diffrax
import jax
import jax.numpy as jnp

def solve(y0):
    saveat = diffrax.SaveAt(t1=True, ts=jnp.array([0.3]), solver_state=True)
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: {"a": -y["b"], "b": y["a"]}),
        diffrax_deer.DeerSolver(substeps=4),
        0,
        1,
        0.5,
        y0,
        saveat=saveat,
        stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
    )
    return jnp.sum(sol.ys["a"])

print(jax.grad(solve)({"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3))}))
"""


def test_runtime_type_checking():
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
