"""Writes that go around the page cache, where the system lets them, while their caller prepares the next.

The page cache costs a fresh page and a copy for every 4 kB, and then the time of a thread that flushes them, all taken
from the training; and it drops what the training reads, to keep what nobody will read soon. Here bytes are collected
in a few small buffers, in memory that the disk can read directly. While threads wait for the disk, the caller fills the
next one and adds up checksums.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from ..interfaces import PAGE
from .files import Files, naming, write_all

STEP = 4 << 20
"""Bytes of a buffer: few enough to stay in the processor's cache on their way, enough to keep the disk busy."""

THREADS = 2
"""Writes in flight: the disk has the next one while one that is done waits for its turn in Python."""

BUFFERS = 3
"""Two that are written and one that is filled."""

WORTH = 1 << 20
"""The least bytes for which it is worth it."""


@dataclass
class Step:
    """Bytes of a file in a buffer that holds a stretch of it from `base` on, filled from `start` to `stop`."""

    name: str
    buffer: memoryview
    base: int
    start: int
    stop: int

    def part(self, start: int, stop: int) -> tuple[memoryview, int]:
        """Those bytes of the buffer, and where they go."""
        return self.buffer[start:stop], self.base + start


class Stream(Files):
    """Writes what it is given until `wait`: large stretches as a whole, in however many parts they come.

    `ordinary` are the same files opened in the ordinary way, for the rest.
    """

    flags = os.O_WRONLY | getattr(os, "O_DIRECT", 0)

    def __init__(self, folder: Path, ordinary: Files) -> None:
        super().__init__(folder)
        self.ordinary = ordinary
        self._works = hasattr(os, "O_DIRECT")
        self._threads: list[threading.Thread] = []
        self._buffers = 0
        self._filling: Step | None = None
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        self._steps: SimpleQueue[Step | None] = SimpleQueue()
        self._failure: Exception | None = None

    def write(self, file: str, data: memoryview, offset: int) -> None:
        """Take bytes that go to `offset` of a file. Raises OSError, or CheckpointError for what was taken before."""
        while data:
            step = self._step(file, offset)
            size = min(STEP - step.stop, len(data))
            step.buffer[step.stop : step.stop + size] = data[:size]
            step.stop += size
            data, offset = data[size:], offset + size

    def wait(self) -> None:
        """Until everything is written. Raises CheckpointError if something could not be."""
        self._send()
        if self._buffers:
            for buffer in [self._free.get() for _ in range(BUFFERS)]:
                self._free.put(buffer)
        self._check()

    def close(self) -> None:
        """Write what is left, end the thread and close all files; only `wait` tells whether all was written."""
        self._send()
        for _ in self._threads:
            self._steps.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        super().close()

    def _step(self, file: str, offset: int) -> Step:
        """The one that is being filled, if these bytes come next and it has room, else a new one."""
        step = self._filling
        if step and (step.name, step.base + step.stop) == (file, offset) and step.stop < STEP:
            return step
        self._send()
        self._open_both(file)
        start = offset % STEP
        self._filling = Step(file, self._buffer(), offset - start, start, start)
        return self._filling

    def _open_both(self, file: str) -> None:
        """Both ways, in the caller's thread, as the other only uses what is open."""
        self.ordinary.open(file)
        try:
            if self._works:
                self.open(file)
        except OSError as error:
            self._works = _may_be_refused(error)

    def _buffer(self) -> memoryview:
        if not self._buffers:
            self._start()
        buffer = self._free.get()
        if self._failure:
            self._free.put(buffer)
        self._check()
        return buffer

    def _start(self) -> None:
        self._buffers = BUFFERS
        for _ in range(BUFFERS):
            self._free.put(_large_page())
        with suppress(RuntimeError):  # while Python ends, it starts no threads: then the caller's writes
            for _ in range(THREADS):
                thread = threading.Thread(target=self._run, name="accel-writer")
                thread.start()
                self._threads.append(thread)

    def _check(self) -> None:
        if self._failure:
            raise self._failure

    def _send(self) -> None:
        if self._filling and self._threads:
            self._steps.put(self._filling)
        elif self._filling:
            self._carry_out(self._filling)
        self._filling = None

    def _run(self) -> None:
        while step := self._steps.get():
            self._carry_out(step)

    def _carry_out(self, step: Step) -> None:
        """Write it, unless one before has failed, and let its buffer be used again."""
        try:
            if not self._failure:
                with naming(self.folder / step.name, "written"):
                    self._write(step)
        except Exception as error:  # noqa: BLE001 - the caller raises it
            self._failure = error
        self._free.put(step.buffer)

    def _write(self, step: Step) -> None:
        """Whole pages around the page cache, if they are worth it, and what is left through it."""
        first, last = -(-step.start // PAGE) * PAGE, step.stop // PAGE * PAGE
        done = first = min(first, step.stop)
        if self._works and last - first >= WORTH:
            done += self._write_directly(step, first, last)
        for start, stop in ((step.start, first), (done, step.stop)):
            write_all(self.ordinary.open(step.name), *step.part(start, stop))

    def _write_directly(self, step: Step, start: int, stop: int) -> int:
        """Returns how many bytes were written; less than all means that the file system cannot do it."""
        done = 0
        try:
            done = os.pwrite(self.open(step.name), *step.part(start, stop))
        except OSError as error:
            _may_be_refused(error)
        if done < stop - start:
            self._works = False
        return done


def _may_be_refused(error: OSError) -> bool:
    """False, if this is how file systems say that they cannot write so; raises what is another error."""
    if error.errno != errno.EINVAL:
        raise error
    return False


def _large_page() -> memoryview:
    """Memory of which the disk is told as one stretch and not page by page."""
    memory = mmap.mmap(-1, STEP, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)
