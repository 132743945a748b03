"""Reading what is wanted of a checkpoint, and checking it on the way.

Memory that is empty is filled while its bytes are checked. Memory in use must not be touched before all is known to be
whole: its bytes are checked first, in the page cache, which the processes of a machine share, and then read. A second
memory to put them aside would cost more: to be given memory by the system takes longer than to read into it.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .disk import CHUNK, Geometry, Range, Reader
from .files import naming
from .manifest import Problem, check

T = TypeVar("T")

LATER, NOW = 1, 2
"""When a range is checked that is wanted: before memory in use is filled, or while empty memory is."""

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
        """For each range NOW if it is checked while empty memory is filled, else LATER if it is wanted, else 0."""

        self._steps: list[Step] = []
        self._stamps: dict[str, tuple[int, ...]] = {}
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

    def share(self, numbers: Iterable[int], index: int, count: int) -> list[int]:
        """One of several consecutive stretches of the ranges of these numbers, of about as many bytes each."""
        return _stretches(list(numbers), lambda i: self.ranges[i], count)[index]

    def read(self, numbers: Iterable[int]) -> list[Problem]:
        """Fill what is not in use and check it, and the ranges of these numbers; returns what is damaged.

        Raises CheckpointError if a file cannot be read or ends too early where no checksum is known.
        """
        self._stamps = {file: self._stamp(file) for file in {step.range.file for step in self._steps}}
        return self._run([*(step for step in self._steps if not step.used), *(Step(self.ranges[i]) for i in numbers)])

    def replace(self) -> list[Problem]:
        """Fill what is in use; returns which files have changed since `read`. If before this, nothing is filled.

        It is for the caller to have had the ranges checked that are marked LATER. Raises CheckpointError if a file
        cannot be read, after which memory is half filled.
        """
        if changed := self._changed():
            return changed
        return self._run([_plain(step) for step in self._steps if step.used]) + self._changed()

    def _changed(self) -> list[Problem]:
        reason = "has been changed while it was read"
        return [Problem(file, "", reason) for file, stamp in self._stamps.items() if self._stamp(file) != stamp]

    def _stamp(self, file: str) -> tuple[int, ...]:
        """What tells a file from another, or from itself before it was written to."""
        with naming(self.folder / file, "read"):
            facts = os.stat(self.folder / file)
        return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns

    def _run(self, steps: Sequence[Step]) -> list[Problem]:
        with ThreadPoolExecutor(THREADS) as pool:
            shares = _stretches(steps, lambda step: step.range, THREADS)
            return [problem for found in pool.map(self._carry_out, shares) for problem in found]

    def _carry_out(self, steps: Sequence[Step]) -> list[Problem]:
        """In one thread, with open files of its own: the system reads ahead for each of them."""
        with Reader(self.folder) as reader:
            return [problem for step in steps if (problem := _carry_out(step, reader))]

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
        self.checks[i] = max(self.checks[i], LATER if used else NOW)
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


def _stretches(items: Sequence[T], range_of: Callable[[T], Range], count: int) -> list[list[T]]:
    """Consecutive stretches of about as many bytes: what the system reads ahead is read by who will need it.

    The system then keeps it in large pieces, too, which all who read it later are faster with.
    """
    found: list[list[T]] = [[] for _ in range(count)]
    total, before = sum(range_of(item).total for item in items), 0
    for item in sorted(items, key=lambda item: (range_of(item).file, range_of(item).offset)):
        found[min(before * count // max(total, 1), count - 1)].append(item)
        before += range_of(item).total
    return found


def _geometry(r: Range) -> Geometry:
    return Geometry(r.offset, r.size, r.count, r.stride)


def _plain(step: Step) -> Step:
    """The same bytes, no more than are wanted, without a checksum."""
    r = step.range
    part = r if step.skip is None or step.memory is None else Geometry(r.offset + step.skip, len(step.memory))
    return Step(_unchecked(r.file, part), step.memory)


def _unchecked(file: str, g: Geometry) -> Range:
    return Range(g.offset, g.size, g.count, g.stride, file)
