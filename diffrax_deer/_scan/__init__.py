from .associative import AssociativeScan as AssociativeScan
from .auto import AutoScan as AutoScan
from .base import AbstractScan as AbstractScan, Matrices as Matrices
from .sequential import SequentialScan as SequentialScan
