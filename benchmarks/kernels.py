"""How many kernels a GPU has to launch, and how often its host has to wait: a study
without a GPU.

Small kernels take a GPU about as long as it takes to launch them, so that their number
says how long an iteration takes. XLA can compile for a GPU that is only described to
it. That takes JAX's plugin for CUDA, of the same version as JAX, and the assembler:

    pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12
    python -m benchmarks.kernels --output benchmarks/results/kernels_h200.json

XLA's autotuning would run the kernels, and so is off: products of large matrices may be
divided into kernels in another way than on a GPU.
"""

import os


# Before JAX is imported. There are no drivers whose version could be checked, and what
# raises an error would need a device.
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["EQX_ON_ERROR"] = "nan"
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"

import functools as ft
import time
from collections.abc import Callable, Iterator
from typing import Any

import diffrax as dfx
import diffrax_deer._scan.auto as auto_scan
import diffrax_deer._scan.kernel as kernel_scan
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from diffrax_deer import DeerAdjoint, DeerSolver, GaussLegendre
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from . import _study as study
from ._hlo import Loop, program


# An H200, as its data sheet and the CUDA programming guide (compute capability 9.0)
# say.
_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  cuda_compute_capability { major: 9 }
  name: "NVIDIA H200"
  driver_version: "12.8.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""

Solve = Callable[[Any, Any], Any]


def calls() -> Iterator[tuple[str, str, Solve, Any, Any]]:
    """Each as a user writes it, with the defaults: what is solved and how, a function,
    and its arguments."""

    constant, adaptive = dfx.ConstantStepSize(), dfx.PIDController(rtol=1e-6, atol=1e-6)

    def call(f, solver, t1, controller: Any = constant, saves=None, adjoint=None):
        dt0 = t1 if isinstance(solver, DeerSolver) else 0.1
        ts = None if saves is None else jnp.linspace(0, t1, saves)

        def solve(y0, args):
            return dfx.diffeqsolve(
                *(dfx.ODETerm(f), solver, 0, t1, dt0, y0, args),
                saveat=dfx.SaveAt(t1=True) if ts is None else dfx.SaveAt(ts=ts),
                stepsize_controller=controller,
                adjoint=DeerAdjoint() if adjoint is None else adjoint,
            ).ys

        return solve

    def oscillator(t, y, args):
        return jnp.stack([y[1], -y[0] - 0.1 * y[1] + args * jnp.cos(t)])

    def network(t, y, args):
        return jnp.tanh(args @ y) - 0.1 * y

    def robertson(t, y, args):
        a, b, c = args
        first, last = -a * y[0] + c * y[1] * y[2], b * y[1] ** 2
        return jnp.stack([first, -first - last, last])

    mlp = eqx.nn.MLP(8, "scalar", 64, 6, jax.nn.softplus, key=jr.key(0))
    params, static = eqx.partition(mlp, eqx.is_array)

    def hamiltonian(t, y, args):
        dx, dv = jnp.split(jax.grad(eqx.combine(args, static))(y), 2)
        return jnp.concatenate([dv, -dx])

    sequential = ft.partial(call, oscillator, dfx.Tsit5(), 100, adaptive)
    name, args = "oscillator", (jnp.ones(2), jnp.array(0.3))
    default = dfx.RecursiveCheckpointAdjoint()
    yield name, "`Tsit5`, adaptive", sequential(adjoint=default), *args
    yield name, "... with `DeerAdjoint`", sequential(), *args
    solver = DeerSolver(dfx.Tsit5(), 10_000)
    yield name, "10,000 substeps of `Tsit5`", call(oscillator, solver, 100), *args
    solver, args = DeerSolver(dfx.Tsit5(), 1000), (jnp.ones(8), jnp.ones((8, 8)))
    yield "network of 8", "1,000 of `Tsit5`", call(network, solver, 10), *args
    solver = DeerSolver(GaussLegendre(4), 128)
    solve, args = call(network, solver, 10), (jnp.ones(4), jnp.ones((4, 4)))
    yield "network of 4", "128 of `GaussLegendre(4)`", solve, *args
    solve = call(robertson, DeerSolver(dfx.Kvaerno5(), 100), 10, adaptive)
    args = jnp.array([1.0, 0.0, 0.0]), jnp.array([0.04, 3e7, 1e4])
    yield "Robertson", "windows of 100 of `Kvaerno5`", solve, *args
    solve = call(hamiltonian, DeerSolver(dfx.Tsit5(), 128), 10, saves=10_000)
    solve, name = jax.vmap(solve, in_axes=(0, None)), "Hamiltonian network 6 x 64"
    how = "128 of `Tsit5`, batch of 16, 10,000 saves"
    yield name, how, solve, jnp.ones((16, 8)), params


def rows_of(task: str, name: str, solve: Solve, *args: Any) -> list[study.Row]:
    total = lambda *args: jnp.sum(solve(*args))
    rows = []
    for what, fn in dict(value=solve, gradient=jax.grad(total, (0, 1))).items():
        start = time.perf_counter()
        compiled = compile_for_gpu(fn, *args)
        seconds = time.perf_counter() - start
        columns: study.Row = dict(task=task, name=name, what=what)
        for label, loop in labelled(program(compiled.as_text())):
            counts = dict(kernels=loop.kernels, waits=loop.waits)
            rows.append(dict(**columns, loop=label, **counts))
        memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
        rows.append(dict(**columns, compile_s=seconds, temp_mib=memory))
    return rows


def labelled(whole: Loop) -> Iterator[tuple[str, Loop]]:
    """Those loops that most of the time goes to."""
    is_open = lambda loop: loop.trips is None
    for loop in filter(is_open, whole.loops):
        label = "backwards" if loop.is_backwards else "a step"
        yield label, loop
        for inner in filter(is_open, loop.loops):
            yield f"{label}, within", inner


def compile_for_gpu(fn: Callable, *args: Any) -> Any:
    [device] = _topology().devices
    where = NamedSharding(Mesh([device], ("x",)), PartitionSpec())
    described = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    args = jax.tree_util.tree_map(described, args)
    traced = jax.jit(fn, in_shardings=where, out_shardings=where).trace(*args)
    return traced.lower(lowering_platforms=("cuda",)).compile()


@ft.cache
def _topology():
    return topologies.get_topology_desc(
        "", "cuda", target_config=_TARGET, topology="1x1x1"
    )


def main():
    args = study.arguments(__doc__)
    _topology()
    # What is decided when a solve is traced.
    jax.default_backend = lambda: "gpu"
    kernel_scan.has_gpu = auto_scan.has_gpu = lambda: True
    rows = []
    for call in tqdm(list(calls()), unit="call"):
        rows += rows_of(*call)
    study.show(rows)
    study.save(args, rows)


if __name__ == "__main__":
    main()
