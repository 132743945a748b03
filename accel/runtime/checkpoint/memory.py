"""Memory for what is read and for snapshots: how to get it, and how to fill it."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ...storage import CHUNK

LARGE = 4 << 20
"""The least bytes for which large pages, two of them, and threads are worth it."""

THREADS, MOST_THREADS = 2, 8
"""Of a copy: at the least, and at the most, where torch has as many; by then the memory is what it waits for."""


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor on the CPU, in large pages if the system has them and the tensor is large.

    In small pages, memory takes longer to be given by the system than to be filled.
    """
    tensor = torch.empty(shape, dtype=dtype)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and tensor.nbytes >= LARGE:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)  # advice: it may be refused
    return tensor


def copy_bytes(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy bytes of the CPU into others, each pair a target and a source of the same length.

    In this thread and in some of its own, as workers leave torch only one: a single core does not use what the memory
    can. NumPy, as it calls the system's `memcpy`, which keeps large copies out of the processor's cache.
    """
    stretches = iter(
        [both for pair in pairs for both in zip(*(torch.split(side, CHUNK) for side in pair), strict=True)]
    )

    def work() -> None:
        for target, source in stretches:  # each thread takes the next
            np.copyto(target.numpy(), source.numpy())

    others = max(THREADS, min(torch.get_num_threads(), MOST_THREADS)) - 1
    with ThreadPoolExecutor(others) as pool:
        working = [pool.submit(work) for _ in range(others)]
        work()
    for done in working:
        done.result()
