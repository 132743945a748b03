"""Reading what is wanted of a checkpoint, and checking it on the way.

Memory that is empty is filled while its bytes are checked. Memory in use must not be touched before all is known to be
whole: its bytes are checked first, in little memory, and read again by then from the page cache. A second memory to
put them aside would cost more: to be given memory by the system takes longer than to read into it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from .disk import CHUNK, Geometry, Range, Reader
from .files import naming
from .manifest import Problem, check

THREADS = 2
"""Readers of one process: while one waits for the disk, another adds up a checksum."""


@dataclass(frozen=True)
class Step:
    """One read of a range, or of bytes of which no checksum is known.

    What is read goes to `memory`; if `skip` is given, only what comes after so many bytes, as far as it has room.
    With `used`, the memory is in use: it is filled only by `replace`.
    """

    range: Range
    memory: memoryview | None = None
    skip: int | None = None
    used: bool = False


class CheckedReader:
    """Fills memory from files whose ranges are known, and compares each range that it touches with its checksum.

    A range of which only a part is wanted is read whole, as its checksum stands for the whole. What is wanted in runs
    is checked if it was written in the same runs, and is else for others to check.
    """

    def __init__(self, folder: Path, ranges: Sequence[Range]) -> None:
        self.folder, self.ranges = folder, ranges
        self.checks = bytearray(len(ranges))
        """For each range, 1 if what is wanted touches it."""

        self._steps: list[Step] = []
        self._exact = {(r.file, _geometry(r)): i for i, r in enumerate(ranges)}
        self._stretches: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for i, r in sorted(enumerate(ranges), key=lambda item: item[1].offset):
            if r.count == 1 and r.size:
                self._stretches[r.file].append((r.offset, i))

    def want(self, file: str, geometry: Geometry, memory: memoryview, used: bool) -> None:
        """Ask for bytes: they are in the memory after `read`, or if it is in use, after `replace`."""
        exact = self._exact.get((file, geometry))
        if exact is not None:
            self._touch(exact, memory, used=used)
        elif geometry.count > 1:
            self._steps.append(Step(_unchecked(file, geometry), memory, used=used))
        else:
            self._want_stretch(file, geometry, memory, used)

    def read(self, others: Iterable[int] = ()) -> Iterator[Problem]:
        """Check what is wanted and the ranges of these numbers, fill what is not in use; yields what is damaged.

        Raises CheckpointError if a file cannot be read or ends too early where no checksum is known.
        """
        now = [step for step in self._steps if step.range.checksum or not step.used]
        first = [replace(step, memory=None) if step.used else step for step in now]
        return self._run([*first, *(Step(self.ranges[i]) for i in others)])

    def replace(self) -> Iterator[Problem]:
        """Fill what is in use; errors as in `read`, after which it is half filled."""
        return self._run([step for step in self._steps if step.used])

    def _run(self, steps: Sequence[Step]) -> Iterator[Problem]:
        with Reader(self.folder) as reader, ThreadPoolExecutor(THREADS) as pool:
            for file in {step.range.file for step in steps}:
                with naming(self.folder / file, "read"):
                    reader.open(file)
            yield from filter(None, pool.map(lambda step: _carry_out(step, reader), steps))

    def _want_stretch(self, file: str, geometry: Geometry, memory: memoryview, used: bool) -> None:
        start, stop = geometry.offset, geometry.offset + geometry.size
        done, stretches = start, self._stretches[file]
        for offset, i in stretches[max(bisect_right(stretches, (start, len(self.ranges))) - 1, 0) :]:
            low, high = max(offset, done), min(offset + self.ranges[i].size, stop)
            if offset >= stop:
                break
            if low < high:
                self._want_unchecked(file, done, memory[done - start : low - start], used)
                whole = high - low == self.ranges[i].size
                self._touch(i, memory[low - start : high - start], None if whole else low - offset, used)
                done = high
        self._want_unchecked(file, done, memory[done - start :], used)

    def _want_unchecked(self, file: str, offset: int, memory: memoryview, used: bool) -> None:
        for begin in range(0, len(memory), CHUNK):
            part = memory[begin : begin + CHUNK]
            self._steps.append(Step(_unchecked(file, Geometry(offset + begin, len(part))), part, used=used))

    def _touch(self, i: int, memory: memoryview, skip: int | None = None, used: bool = False) -> None:
        self.checks[i] = 1
        self._steps.append(Step(self.ranges[i], memory, skip, used))


def _carry_out(step: Step, reader: Reader) -> Problem | None:
    partly = step.memory is not None and step.skip is not None
    memory = reader.scratch(step.range.total) if partly else step.memory
    if memory is not None and not step.range.checksum:
        reader.read(step.range.file, step.range, memory)
        return None
    problem = check(reader, step.range, memory)
    if step.memory is not None and step.skip is not None and memory is not None:
        step.memory[:] = memory[step.skip : step.skip + len(step.memory)]
    return problem


def _geometry(r: Range) -> Geometry:
    return Geometry(r.offset, r.size, r.count, r.stride)


def _unchecked(file: str, g: Geometry) -> Range:
    return Range(g.offset, g.size, g.count, g.stride, file)
