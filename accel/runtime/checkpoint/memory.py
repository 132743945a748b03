"""Memory that is filled once: in small pages it takes longer to be given by the system than to be filled."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 4 << 20
"""The least bytes for which it is worth it: two large pages."""


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor on the CPU, in large pages if the system has them and the tensor is large."""
    tensor = torch.empty(shape, dtype=dtype)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and tensor.nbytes >= LARGE:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)  # advice: it may be refused
    return tensor
