"""What is wanted arrives, whatever ranges it was written in; what is damaged is told, and memory in use waits."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path
from typing import Any

import pytest

from accel.errors import CheckpointError
from accel.storage import LATER, NOW, CheckedReader, Geometry, Range, Writer

SIZE = 1000


def written(folder: Path, draw: random.Random) -> tuple[bytes, list[Range]]:
    """A file in ranges of any lengths, the last 200 bytes in runs; a gap of which no checksum is known."""
    data = draw.randbytes(SIZE)
    cuts = [*sorted(draw.sample(range(801), 6)), 800]
    shapes = [Geometry(start, stop - start) for start, stop in itertools.pairwise(cuts) if start < stop]
    shapes += [Geometry(800 + 10 * i, 10, 5, 40) for i in range(4)]
    draw.shuffle(shapes)
    with Writer(folder) as writer:
        writer.create("f", SIZE, b"")
        for shape in shapes:
            writer.write("f", shape, memoryview(taken(data, shape)))
        ranges = writer.written[1:]
    (folder / "f").write_bytes(data)
    return data, ranges


def taken(data: bytes, g: Geometry) -> bytes:
    return b"".join(data[run : run + g.size] for run in g.runs())


def wanted(draw: random.Random) -> list[tuple[Geometry, bytearray, bool]]:
    shapes = [Geometry(start := draw.randrange(SIZE), draw.randint(1, SIZE - start)) for _ in range(3)]
    shapes += [Geometry(810, 10, 5, 40), Geometry(3, 20, 4, 50)]
    return [(shape, bytearray(b"?" * shape.total), draw.random() < 0.5) for shape in shapes]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_wanted_arrives_and_damage_is_told(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    data, ranges = written(tmp_path, draw)
    reader, wishes = CheckedReader(tmp_path, ranges), wanted(draw)
    for shape, memory, used in wishes:
        reader.want("f", shape, memoryview(memory), used)
    others = [i for i, mark in enumerate(reader.checks) if mark != NOW]
    assert reader.read(others) == []
    for shape, memory, used in wishes:
        assert memory == (b"?" * shape.total if used else taken(data, shape))
    assert reader.replace() == []
    assert all(memory == taken(data, shape) for shape, memory, _ in wishes)
    for place in draw.sample(range(SIZE), 10):
        struck = [r for r in ranges if any(run <= place < run + r.size for run in r.runs())]
        damaged = bytearray(data)
        damaged[place] ^= 4
        (tmp_path / "f").write_bytes(damaged)
        assert len(set(map(str, reader.read(others)))) == len(struck)


def test_each_byte_is_read_once_unless_its_memory_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(0).randbytes(SIZE)
    with Writer(tmp_path) as writer:
        writer.create("f", SIZE, b"")
        for start in range(0, SIZE, 100):
            writer.write("f", Geometry(start, 100), memoryview(data)[start : start + 100])
        ranges = writer.written[1:]
    real, count = os.preadv, [0]

    def counting(handle: int, buffers: Any, offset: int) -> int:
        got = real(handle, buffers, offset)
        count[0] += got
        return got

    monkeypatch.setattr(os, "preadv", counting)
    reader = CheckedReader(tmp_path, ranges)
    reader.want("f", Geometry(0, 500), memoryview(bytearray(500)), used=False)
    reader.want("f", Geometry(500, 300), memoryview(bytearray(300)), used=True)
    assert reader.read([i for i, mark in enumerate(reader.checks) if mark == LATER]) == []
    assert count == [800]
    assert reader.replace() == []
    assert count == [1100]


def test_shares_are_consecutive_and_even(tmp_path: Path) -> None:
    ranges = [Range(offset, 10, file=file) for offset in range(0, 1000, 10) for file in ("b", "a")]
    reader = CheckedReader(tmp_path, ranges)
    shares = [reader.share(range(len(ranges)), index, 3) for index in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(len(ranges)))
    assert [(ranges[i].file, ranges[i].offset) for share in shares for i in share] == sorted(
        (r.file, r.offset) for r in ranges
    )
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert reader.share([], 0, 3) == []


def test_files_that_change_before_memory_in_use_is_filled(tmp_path: Path) -> None:
    """Written to in place, or replaced by another: it is told, and the memory is as it was."""
    data, ranges = written(tmp_path, random.Random(0))
    file, other = tmp_path / "f", tmp_path / "g"
    for change in (lambda: file.write_bytes(data[::-1]), lambda: other.replace(file)):
        file.write_bytes(data)
        other.write_bytes(data)
        memory, reader = bytearray(100), CheckedReader(tmp_path, ranges)
        reader.want("f", Geometry(10, 100), memoryview(memory), used=True)
        assert reader.read(range(len(ranges))) == []
        change()
        assert [str(problem) for problem in reader.replace()] == ["f: has been changed while it was read"]
        assert memory == bytearray(100)


def test_files_that_end_or_are_gone(tmp_path: Path) -> None:
    data, ranges = written(tmp_path, random.Random(0))
    os.truncate(tmp_path / "f", 990)
    found = CheckedReader(tmp_path, ranges).read(range(len(ranges)))
    assert [problem.reason for problem in found] == ["ends too early"]
    reader = CheckedReader(tmp_path, ranges[:1])
    reader.want("f", Geometry(980, 20), memoryview(bytearray(20)), used=False)
    with pytest.raises(CheckpointError, match="f: damaged: ends at byte 990"):
        reader.read([])
    (tmp_path / "f").unlink()
    with pytest.raises(CheckpointError, match="f: cannot be read: No such file"):
        reader.read([])
    assert len(data) == SIZE
