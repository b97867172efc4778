from .associative import AssociativeScan as AssociativeScan
from .auto import AutoScan as AutoScan
from .base import AbstractScan as AbstractScan
from .blockwise import BlockwiseScan as BlockwiseScan
from .kernel import KernelScan as KernelScan
from .sequential import SequentialScan as SequentialScan
