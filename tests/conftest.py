import os


# Most of the time is spent compiling. Of loops with many operations, which a scan over
# the steps of a solver is, XLA's newer emitter takes several times as long.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
)

import jax
import pytest


jax.config.update("jax_enable_x64", True)


@pytest.fixture(autouse=True, scope="module")
def free_compiled_functions():
    # Each of them takes some memory mappings, of which Linux allows a process 65530.
    # XLA crashes when there are no more.
    yield
    jax.clear_caches()
