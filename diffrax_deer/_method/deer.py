from .base import AbstractUndampedMethod
from .linearisation import AbstractFullMethod


class DEER(AbstractFullMethod, AbstractUndampedMethod):
    """DEER: the full Jacobians, that is, Newton's method for all of the window at once.

    Close to the solution it converges quadratically.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{lim2024parallelizing,
            author={Lim, Yi Heng and Zhu, Qi and Selfridge, Joshua and
                    Kasim, Muhammad Firmansyah},
            title={Parallelizing non-linear sequential models over the sequence length},
            booktitle={International Conference on Learning Representations},
            year={2024},
        }
        ```
    """


DEER.__init__.__doc__ = """**Arguments:** None"""
