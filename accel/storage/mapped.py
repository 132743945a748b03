"""Looking at bytes of a file where the page cache has them, which copies none.

The system kills a process that touches a mapped page which it cannot bring: the file ends before, the disk fails. So
all pages are asked for first, which at worst is an error; who gets it reads them in the ordinary way, to be told more.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable

POPULATE_READ = 22
"""Linux's advice to bring all pages now, since 5.14; Python has no name for it."""

WORTH = 1 << 20
"""The least bytes for which it is worth it."""


def show(handle: int, offset: int, size: int, see: Callable[[memoryview], object]) -> bool:
    """Let `see` have these bytes of an open file; False if they cannot be had in this way, and then it saw none."""
    if size < WORTH or sys.platform != "linux":
        return False
    first = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    try:
        pages = mmap.mmap(handle, offset + size - first, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=first)
    except (OSError, ValueError):  # the latter if the file ends before
        return False
    with pages:
        try:
            pages.madvise(POPULATE_READ)
        except OSError:
            return False
        with memoryview(pages) as whole, whole[offset - first :] as wanted:
            see(wanted)
    return True
