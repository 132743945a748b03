"""Bytes into and out of files, at places of our choice; every failure of the system is a CheckpointError by name."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ..errors import CheckpointError
from .direct import Stream
from .files import Files, naming, write_all
from .mapped import show

CHUNK = 16 << 20
"""The most bytes that one checksum stands for."""

PIECE = 1 << 20
"""Bytes that stay in the processor's cache while their checksum is added up."""


@dataclass(frozen=True)
class Geometry:
    """Bytes of a file: `count` runs of `size` bytes, the first from `offset`, each `stride` after the one before."""

    offset: int
    size: int
    count: int = 1
    stride: int = 0

    @property
    def total(self) -> int:
        """Bytes of all runs."""
        return self.size * self.count

    def stretches(self, most: int) -> Iterator[Geometry]:
        """The same bytes as single runs of no more than so many."""
        for run in self.runs():
            for start in range(0, self.size, most):
                yield Geometry(run + start, min(most, self.size - start))

    def runs(self) -> Iterator[int]:
        """Where each run begins."""
        return (self.offset + i * self.stride for i in range(self.count))


@dataclass(frozen=True)
class Range(Geometry):
    """Bytes of a named file with their checksum, and the tensor that they belong to, if any."""

    file: str = ""
    checksum: str = ""
    tensor: str = ""

    @property
    def title(self) -> str:
        """What error messages call it."""
        return f"{self.file}: {self.tensor}" if self.tensor else f"{self.file}: bytes from {self.offset}"


Checksum = xxhash.xxh3_64
"""XXH3 with 64 bits: at the speed of memory, where zlib's checksums are slower than a disk."""


def checksum(data: bytes | bytearray | memoryview) -> str:
    """That of all the data, in hexadecimal."""
    return Checksum(data).hexdigest()


class Reader(Files):
    """Reads from the files of a folder, in one thread."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._scratch = memoryview(b"")

    def scan(self, file: str, run: Geometry, see: Callable[[memoryview], object], buffer: memoryview | None) -> None:
        """Show one run of bytes; read it into a buffer, piece by piece, if there is one. Errors as `read`."""
        with naming(self.folder / file, "read"):
            handle = self.open(file)
            if buffer is None and show(handle, run.offset, run.size, see):
                return
            for start in range(0, run.size, PIECE):
                stop = min(start + PIECE, run.size)
                piece = self.scratch(stop - start) if buffer is None else buffer[start:stop]
                self._fill(handle, file, piece, run.offset + start)
                see(piece)

    def read(self, file: str, geometry: Geometry, buffer: memoryview) -> None:
        """Fill a buffer of `geometry.total` bytes. Raises CheckpointError if the file ends before."""
        with naming(self.folder / file, "read"):
            handle = self.open(file)
            for i, offset in enumerate(geometry.runs()):
                self._fill(handle, file, buffer[i * geometry.size : (i + 1) * geometry.size], offset)

    def scratch(self, size: int) -> memoryview:
        """Memory that is used over again; it begins a page, as what is read into it likes to."""
        if len(self._scratch) < size:
            self._scratch = memoryview(mmap.mmap(-1, size))
        return self._scratch[:size]

    def _fill(self, handle: int, file: str, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            got = os.preadv(handle, [buffer[done:]], offset + done)
            if not got:
                raise CheckpointError(f"{self.folder / file}: damaged: ends at byte {offset + done}")
            done += got


class Writer(Files):
    """Writes into the files of a folder, and remembers where with which checksum."""

    flags = os.O_RDWR

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.written: list[Range] = []
        self._stream = Stream(folder, self)

    def create(self, file: str, size: int, head: bytes) -> None:
        """Make a file of this size that begins with `head`."""
        with naming(self.folder / file, "written"):
            os.ftruncate(self.open(file, os.O_CREAT | os.O_EXCL), size)
            write_all(self.open(file), memoryview(head), 0)
        self.written.append(Range(0, len(head), file=file, checksum=checksum(head)))

    def write(self, file: str, geometry: Geometry, data: memoryview, tensor: str = "") -> None:
        """Take `geometry.total` bytes, which are written by `flush`. Raises CheckpointError, also for those before."""
        g = geometry
        with naming(self.folder / file, "written"):
            if g.count == 1:
                self._stream.write(file, data, g.offset)
            else:
                for i, offset in enumerate(g.runs()):
                    write_all(self.open(file), data[i * g.size : (i + 1) * g.size], offset)
        self.written.append(Range(g.offset, g.size, g.count, g.stride, file, checksum(data), tensor))

    def close(self) -> None:
        """Close all files; only `flush` tells whether all was written."""
        self._stream.close()
        super().close()

    def flush(self) -> None:
        """Wait until everything is on disk. Raises CheckpointError."""
        self._stream.wait()
        for name in self.names:
            with naming(self.folder / name, "written"):
                os.fsync(self.open(name))
