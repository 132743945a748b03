"""The open files of a folder, and what is said when the system refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from ..errors import CheckpointError


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

    @property
    def names(self) -> set[str]:
        """The files that have been opened."""
        return set(self._open)

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


def flush_folder(folder: Path) -> None:
    """Wait until the entries of a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(handle: int, data: memoryview, offset: int) -> None:
    """Write bytes at a place of an open file, in as many writes as the system takes for it. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], offset + done)


@contextmanager
def naming(path: Path, participle: str) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that names the path."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be {participle}: {error.strerror or error}") from error
