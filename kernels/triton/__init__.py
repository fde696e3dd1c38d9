"""The kernels in Triton, for CUDA and ROCm: selection in one pass over the index keys, and decoding."""

from flexmsa.kernels.triton.decode import attend_blocks, decode
from flexmsa.kernels.triton.selection import select_blocks

__all__ = ["attend_blocks", "decode", "select_blocks"]
