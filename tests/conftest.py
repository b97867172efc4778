import gc
import importlib.metadata
import os


# Most of the time is spent compiling. Of loops with many operations, which a scan over
# the steps of a solver is, XLA's newer emitter takes several times as long. (Later
# versions have nothing else, and crash if they are given a flag that they do not know.)
flags = "--xla_backend_optimization_level=0"
version = importlib.metadata.version("jaxlib").split(".")
if (int(version[0]), int(version[1])) < (0, 11):
    flags += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", flags)
# Its threads wait for one another by spinning, which takes seconds if there are other
# processes on the same cores, such as tests.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest


jax.config.update("jax_enable_x64", True)
# For what is divided over several of them.
jax.config.update("jax_num_cpu_devices", 8)


# To trace makes many objects, and few that the collector finds: a tenth of the time.
gc.freeze()
gc.set_threshold(100_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def free_compiled_functions():
    # Each of them takes some memory mappings, of which Linux allows a process 65530.
    # XLA crashes when there are no more.
    yield
    jax.clear_caches()
    gc.collect()
