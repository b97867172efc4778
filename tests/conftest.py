import os


# Most of the time is spent compiling.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax


jax.config.update("jax_enable_x64", True)
