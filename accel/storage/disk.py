"""Bytes into and out of files, at places of our choice; every failure of the system is a CheckpointError by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import xxhash

from ..errors import CheckpointError

CHUNK = 16 << 20
"""The most bytes that one checksum stands for."""


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


def checksum(data: bytes | bytearray | memoryview) -> str:
    """XXH3 with 64 bits, in hexadecimal: at the speed of memory, where zlib's checksums are slower than a disk."""
    return xxhash.xxh3_64_hexdigest(data)


class Files:
    """The open files of one folder. Use as a context manager."""

    flags = os.O_RDONLY

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()

    def open(self, name: str, flags: int = 0) -> int:
        """The file's descriptor, opened on first use. Raises OSError."""
        if name not in self._open:
            self._open[name] = os.open(self.folder / name, self.flags | flags, 0o666)
        return self._open[name]


class Reader(Files):
    """Reads from the files of a folder."""

    def read(self, file: str, geometry: Geometry, buffer: memoryview) -> None:
        """Fill a buffer of `geometry.total` bytes. Raises CheckpointError if the file ends before."""
        with naming(self.folder / file, "read"):
            handle = self.open(file)
            for i, offset in enumerate(geometry.runs()):
                self._fill(handle, file, buffer[i * geometry.size : (i + 1) * geometry.size], offset)

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

    def create(self, file: str, size: int, head: bytes) -> None:
        """Make a file of this size that begins with `head`."""
        with naming(self.folder / file, "written"):
            os.ftruncate(self.open(file, os.O_CREAT | os.O_EXCL), size)
        self.write(file, Geometry(0, len(head)), memoryview(head))

    def write(self, file: str, geometry: Geometry, data: memoryview, tensor: str = "") -> None:
        """Write `geometry.total` bytes."""
        with naming(self.folder / file, "written"):
            handle = self.open(file)
            for i, offset in enumerate(geometry.runs()):
                _drain(handle, data[i * geometry.size : (i + 1) * geometry.size], offset)
        g = geometry
        self.written.append(Range(g.offset, g.size, g.count, g.stride, file, checksum(data), tensor))

    def flush(self) -> None:
        """Wait until everything is on disk."""
        for name, handle in self._open.items():
            with naming(self.folder / name, "written"):
                os.fsync(handle)


def _drain(handle: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], offset + done)


def flush_folder(folder: Path) -> None:
    """Wait until the entries of a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming(path: Path, participle: str) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that names the path."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be {participle}: {error.strerror or error}") from error
