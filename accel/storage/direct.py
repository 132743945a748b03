"""Large writes that go around the page cache, where the system lets them.

The page cache costs a fresh page and a copy for every 4 kB, and then the time of a thread that flushes them, all taken
from the training; and it drops what the training reads, to keep what nobody will read soon. Here bytes go from one
small buffer, in memory that the disk can read directly, as they are copied into it: a save is faster and costs less.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

from .files import Files

ALIGNMENT = 4096
"""Addresses, places in the file and sizes must be multiples of this, whatever the disk."""

STEP = 4 << 20
"""Bytes of a write: few enough to stay in the processor's cache on their way."""

WORTH = 1 << 20
"""The least bytes for which it is worth it."""


class DirectWriter(Files):
    """Writes what it can of large stretches; the rest is the caller's, who writes it in the ordinary way."""

    flags = os.O_WRONLY | getattr(os, "O_DIRECT", 0)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._works = hasattr(os, "O_DIRECT")
        self._buffer: memoryview | None = None

    def write(self, file: str, data: memoryview, offset: int) -> tuple[int, int]:
        """From and to where in `data` it has written; nothing of what is small, or if the file system cannot.

        Raises OSError.
        """
        first = -offset % ALIGNMENT
        last = len(data) - (offset + len(data)) % ALIGNMENT
        if not self._works or last - first < WORTH:
            return 0, 0
        done = first
        try:
            while self._works and done < last:
                step = data[done : min(done + STEP, last)]
                buffer = self._aligned()[: len(step)]
                buffer[:] = step
                self._works = os.pwrite(self.open(file), buffer, offset + done) == len(step)
                done += len(step) * self._works
        except OSError as error:
            if error.errno != errno.EINVAL:  # by which file systems say that they cannot
                raise
            self._works = False
        return first, done

    def _aligned(self) -> memoryview:
        """Memory in large pages, of which the disk is told as one stretch and not page by page."""
        if self._buffer is None:
            memory = mmap.mmap(-1, STEP, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._buffer = memoryview(memory)
        return self._buffer
