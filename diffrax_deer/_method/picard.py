import jax.numpy as jnp
from jaxtyping import Array, Float

from .._window import AbstractWindow
from .base import AbstractUndampedMethod


class Picard(AbstractUndampedMethod):
    r"""Picard iteration: takes the identity for the Jacobian of every substep, so that
    the residuals are just summed up.

    An iteration costs next to nothing but one evaluation of every substep. It converges
    quickly over windows in which the solution changes little.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{shih2023parallel,
            author={Shih, Andy and Belkhale, Suneel and Ermon, Stefano and
                    Sadigh, Dorsa and Anari, Nima},
            title={Parallel Sampling of Diffusion Models},
            booktitle={Advances in Neural Information Processing Systems},
            year={2023},
        }
        ```
    """

    def linearise(
        self, window: AbstractWindow, ys: Float[Array, "substeps size"]
    ) -> Float[Array, "substeps size"]:
        del window
        return jnp.ones_like(ys)


Picard.__init__.__doc__ = """**Arguments:** None"""
