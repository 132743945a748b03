"""Bytes that are looked at where they are: the same as are read, and no signal where they cannot be had."""

from __future__ import annotations

import mmap
import os
import random
from pathlib import Path

import pytest

from accel.storage import Manifest, Writer, mapped
from accel.storage.disk import Geometry
from accel.storage.mapped import WORTH, show


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "f"
    path.write_bytes(random.Random(0).randbytes(3 * WORTH))
    return path


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 3 * WORTH), (1, WORTH), (4096, WORTH + 5), (WORTH + 77, 2 * WORTH - 77)]
)
def test_the_bytes_that_are_asked_for(file: Path, offset: int, size: int) -> None:
    seen: list[bytes] = []
    with file.open("rb") as opened:
        assert show(opened.fileno(), offset, size, lambda view: seen.append(bytes(view)))
    assert seen == [file.read_bytes()[offset : offset + size]]


def test_what_cannot_be_had_is_left_to_others(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few bytes, bytes past the end, a file that is cut after it was mapped, a system that does not know the advice."""
    seen: list[memoryview] = []

    class Cut(mmap.mmap):
        def madvise(self, option: int) -> None:
            os.truncate(file, WORTH)
            super().madvise(option)

    with file.open("rb") as opened:
        for offset, size in ((0, WORTH - 1), (WORTH, 3 * WORTH)):
            assert not show(opened.fileno(), offset, size, seen.append)
        with monkeypatch.context() as patch:
            patch.setattr(mapped.mmap, "mmap", Cut)
            assert not show(opened.fileno(), 0, 3 * WORTH, seen.append)
        monkeypatch.setattr(mapped, "POPULATE_READ", 99)
        assert not show(opened.fileno(), 0, WORTH, seen.append)
    assert seen == []


@pytest.mark.parametrize("known", [True, False])
def test_damage_is_found_with_and_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    if not known:
        monkeypatch.setattr(mapped, "POPULATE_READ", 99)
    data = bytearray(random.Random(1).randbytes(3 * WORTH))
    with Writer(tmp_path) as writer:
        writer.create("f", len(data), b"")
        for start in (0, WORTH + 13):
            stop = len(data) if start else WORTH + 13
            writer.write("f", Geometry(start, stop - start), memoryview(data)[start:stop], f"from {start}")
        manifest = Manifest({"f": len(data)}, writer.written)
    assert list(manifest.problems(tmp_path)) == []
    data[-2] ^= 1
    (tmp_path / "f").write_bytes(data)
    assert [problem.tensor for problem in manifest.problems(tmp_path)] == [f"from {WORTH + 13}"]
    os.truncate(tmp_path / "f", len(data) - 1)
    assert [problem.reason for problem in manifest.problems(tmp_path)] == ["ends too early"]
