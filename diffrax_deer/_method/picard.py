from .base import AbstractUndampedMethod
from .linearisation import AbstractIdleMethod


class Picard(AbstractIdleMethod, AbstractUndampedMethod):
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


Picard.__init__.__doc__ = """**Arguments:** None"""
