"""A disk that fails on purpose: stands in for functions of `os` in this process."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def failing(function: str, code: int, after: int = 0) -> Iterator[None]:
    """Let `os.FUNCTION` raise OSError from its call number `after` on."""
    real, calls = getattr(os, function), iter(range(1 << 30))

    def fail(*arguments: Any, **options: Any) -> Any:
        if next(calls) >= after:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    with replaced(function, fail):
        yield


@contextmanager
def short(most: int = 7) -> Iterator[None]:
    """Let reads and writes move no more than a few bytes at once."""
    write, read = os.pwrite, os.preadv
    with (
        replaced("pwrite", lambda handle, data, offset: write(handle, data[:most], offset)),
        replaced("preadv", lambda handle, buffers, offset: read(handle, [buffers[0][:most]], offset)),
    ):
        yield


@contextmanager
def replaced(function: str, other: Callable[..., Any]) -> Iterator[None]:
    real = getattr(os, function)
    setattr(os, function, other)
    try:
        yield
    finally:
        setattr(os, function, real)


FAULTS = [
    ("pwrite", errno.ENOSPC, 3),
    ("pwrite", errno.EIO, 0),
    ("ftruncate", errno.EFBIG, 1),
    ("fsync", errno.EIO, 0),
    ("fsync", errno.EIO, 4),
    ("open", errno.EROFS, 0),
]
"""What fails with which error, from which call on."""


def flip(path: Path, offset: int) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 16
    path.write_bytes(data)
