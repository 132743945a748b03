"""Who writes what. Each process says which parts of which tensors it holds; those that hold the same part share it.

Nothing here knows strategies: replicas, shards, stages of a pipeline and grids of them are all just holders of parts.
The exchange costs some 50 bytes for each tensor and process.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...errors import CheckpointError
from ...interfaces import Entry
from .parts import Box, item_size


@dataclass(frozen=True)
class Held:
    """A part that a process holds. `alike` says that all who hold it hold the same bytes, as of trained parameters."""

    group: str
    entry: Entry
    box: Box
    alike: bool

    @property
    def size(self) -> int:
        """Bytes of the part."""
        return self.box.elements * item_size(self.entry)


@dataclass(frozen=True)
class Duty:
    """Bytes of a part, counted in row-major order within it, that this process writes."""

    held: Held
    start: int
    stop: int


def all_entries(tables: Sequence[Sequence[Held]]) -> dict[str, list[Entry]]:
    """The whole tensors of each group, in the same order on all ranks.

    Raises CheckpointError if two ranks hold parts of different tensors under one name, or not all parts are held.
    """
    entries: dict[tuple[str, str], Entry] = {}
    boxes: dict[tuple[str, str], set[Box]] = defaultdict(set)
    for rank, table in enumerate(tables):
        for held in table:
            key = held.group, held.entry.name
            if entries.setdefault(key, held.entry) != held.entry:
                here, there = held.entry, entries[key]
                raise CheckpointError(
                    f"{held.group}: {here.name} is {here.dtype} of shape {here.shape} on rank {rank}, and "
                    f"{there.dtype} of shape {there.shape} on another; prepare the same objects on all"
                )
            boxes[key].add(held.box)
    groups: dict[str, list[Entry]] = defaultdict(list)
    for (group, name), entry in entries.items():
        _check_whole(group, entry, boxes[group, name])
        groups[group].append(entry)
    return groups


def duties(tables: Sequence[Sequence[Held]], rank: int) -> Iterator[Duty]:
    """What this rank writes. Holders of the same parts share their bytes evenly, each a consecutive stretch."""
    holders: dict[Held, list[int]] = defaultdict(list)
    for holder, table in enumerate(tables):
        for held in table:
            holders[held].append(holder)
    shared: dict[tuple[int, ...], list[Held]] = defaultdict(list)
    for held, ranks in holders.items():
        shared[tuple(ranks) if held.alike else (ranks[0],)].append(held)
    for sharers, parts in shared.items():
        if rank in sharers:
            yield from _stretch(parts, sharers.index(rank), len(sharers))


def _stretch(parts: Sequence[Held], index: int, count: int) -> Iterator[Duty]:
    """The `index`-th of `count` equal stretches of all bytes of these parts."""
    total = sum(held.size for held in parts)
    first, last = total * index // count, total * (index + 1) // count
    before = 0
    for held in parts:
        start, stop = max(first - before, 0), min(last - before, held.size)
        if start < stop:
            yield Duty(held, start, stop)
        before += held.size


def _check_whole(group: str, entry: Entry, boxes: set[Box]) -> None:
    """Raise CheckpointError unless the parts add up to the whole."""
    elements = sum(box.elements for box in boxes)
    whole = Box((), entry.shape).elements
    if elements != whole:
        raise CheckpointError(
            f"{group}: {entry.name}: the processes hold {elements} of {whole} elements of shape {entry.shape}; "
            "its layout cannot be saved"
        )
