from .associative import AssociativeScan as AssociativeScan
from .auto import AutoScan as AutoScan
from .base import AbstractScan as AbstractScan
from .blockwise import whole_scan as whole_scan
from .kernel import KernelScan as KernelScan
from .sequential import SequentialScan as SequentialScan
from .sharded import ShardedScan as ShardedScan
