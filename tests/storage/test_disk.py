"""Bytes land where they were told to, around the page cache or through it, whatever the file system can."""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accel.errors import CheckpointError
from accel.interfaces import PAGE
from accel.storage import Geometry, Writer
from accel.storage.direct import STEP, WORTH

SIZE = 3 * STEP + 12345
CUTS = [0, 8, WORTH + 77, 2 * WORTH - 1, 2 * WORTH + PAGE, STEP, 2 * STEP + 5, 2 * STEP + 6, SIZE]
"""Where the file is cut into pieces, each written by itself: small, large, aligned and not."""


def direct(handle: int) -> bool:
    with open(f"/proc/self/fdinfo/{handle}") as facts:
        flags = next(line for line in facts if line.startswith("flags"))
    return bool(int(flags.split()[1], 8) & os.O_DIRECT)


def pieces(folder: Path, in_order: bool = False) -> None:
    """Write the pieces, in their order or another, and compare the file with what it should be."""
    data = random.Random(0).randbytes(SIZE)
    order = list(itertools.pairwise(CUTS))
    if not in_order:
        random.Random(1).shuffle(order)
    with Writer(folder) as writer:
        writer.create("file", SIZE, b"")
        for start, stop in order:
            writer.write("file", Geometry(start, stop - start), memoryview(data)[start:stop])
        writer.flush()
    assert (folder / "file").read_bytes() == data


def refuse(thread: threading.Thread) -> None:
    raise RuntimeError("can't create new thread at interpreter shutdown")


@pytest.mark.parametrize("threads", [True, False], ids=["threads", "no threads"])
@pytest.mark.parametrize("in_order", [True, False], ids=["in order", "in disorder"])
def test_every_byte_lands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: bool, in_order: bool) -> None:
    """Small pieces that follow one another are written in large ones; also by the caller, while Python ends."""
    around, real = [0, 0], os.pwrite

    def write(handle: int, data: Any, offset: int) -> int:
        around[direct(handle)] += len(data)
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", write)
    if not threads:
        monkeypatch.setattr(threading.Thread, "start", refuse)
    pieces(tmp_path, in_order)
    assert sum(around) == SIZE
    assert around[1] == 0 or around[1] > SIZE * (0.9 if in_order else 0.6)  # not every file system can


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("fault", [lambda: 0, lambda: 4096, lambda: int("never")], ids=["none", "some", "refused"])
def test_a_file_system_that_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, fault: Callable[[], int]
) -> None:
    """From some large write on, nothing or a part is written, or it is refused: the rest goes the ordinary way."""
    real, calls = os.pwrite, iter(range(1 << 30))

    def write(handle: int, data: Any, offset: int) -> int:
        if direct(handle) and next(calls) >= after:
            try:
                return real(handle, data[: fault()], offset) if fault() else 0
            except ValueError:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from None
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", write)
    pieces(tmp_path)


def test_a_full_disk_is_no_reason_to_go_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(handle: int, data: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", write)
    with pytest.raises(CheckpointError, match="file: cannot be written: No space left on device"):
        pieces(tmp_path)


def test_where_there_is_no_such_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    pieces(tmp_path)
