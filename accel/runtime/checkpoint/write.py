"""Writing a checkpoint: each process its own bytes, in parallel, into files whose layout all of them compute."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ... import storage
from ...interfaces import Checkpoint, Entry, File, Place
from ...storage import Geometry, Range, Writer
from .contents import SMALL, Contents, State, collect_random
from .exchange import Exchange
from .ownership import Duty, Held, all_entries, duties
from .parts import as_bytes, box_of, entry_of, geometries, item_size, local_of

T = TypeVar("T")

VALUES = "state.json"
LARGEST_FILE = 5_000_000_000
"""Bytes of tensors in one file of a checkpoint, as the Hugging Face ecosystem has it."""


@dataclass
class Piece:
    """Bytes that this process writes: a stretch of its part of a tensor. `copy`, if made, holds them."""

    place: Place
    duty: Duty
    tensor: Tensor
    copy: Tensor | None = None

    def bytes(self) -> Tensor:
        """The bytes on the CPU, [stop - start]; the tensor's own memory where it can be."""
        if self.copy is not None:
            return self.copy
        return as_bytes(local_of(self.tensor).contiguous())[self.duty.start : self.duty.stop].cpu()

    @property
    def is_ready(self) -> bool:
        """Whether the bytes are there without a copy."""
        local = local_of(self.tensor)
        return local.device.type == "cpu" and local.is_contiguous()

    def geometries(self) -> Iterable[Geometry]:
        """Where they go in the file."""
        held = self.duty.held
        size = item_size(held.entry)
        for g in geometries(held.entry.shape, held.box, size, self.duty.start, self.duty.stop):
            yield replace(g, offset=g.offset + self.place.offset)


@dataclass
class Work:
    """What this process does for one checkpoint: its `pieces` of models and optimizers.

    On rank 0 also `small` ones of the rest, and all files, which it makes.
    """

    folder: Path
    files: list[File]
    pieces: list[Piece]
    small: list[Piece] = field(default_factory=list)


def size_of(pieces: Sequence[Piece]) -> int:
    """Bytes of all of them."""
    return sum(piece.duty.stop - piece.duty.start for piece in pieces)


@dataclass(frozen=True)
class Layout:
    """Who writes what where, for as long as every process holds the same: `groups` and `held` are this process's.

    `files` are those of models and optimizers, on all ranks; `duties` are this process's.
    """

    groups: Sequence[str]
    held: Sequence[Held]
    files: Sequence[File]
    duties: Sequence[tuple[Place, Duty]]


def plan(
    folder: Path,
    contents: Contents,
    state: State,
    format: Checkpoint,
    exchange: Exchange,
    last: Layout | None,
    copy: Callable[[Work], object] | None,
) -> tuple[Work, Layout]:
    """Agree on the layout of a checkpoint, which is that of the last if nothing has changed; all ranks.

    `copy` takes a snapshot of this process's work: while the processes still agree if nothing has changed here, and
    again if it then has elsewhere.
    """
    rank = exchange.world.rank

    def look() -> tuple[list[Held], Work | None, Any]:
        held = contents.table()
        same = last is not None and (last.groups, last.held) == ([*contents.tensors], held)
        work = plan_work(folder, last, contents, rank) if last is not None and same else None
        return held, work, (same, collect_random(state, rank), contents.scattered())

    if copy:
        (held, work, _), told = exchange.tell_while(look, _told, lambda looked: looked[1] and copy(looked[1]))
    else:
        (held, work, _), told = exchange.tell(look, _told)
    if last is None or work is None or not all(same for same, _, _ in told):
        last = plan_layout(exchange.gather(held), [*contents.tensors], format, LARGEST_FILE, rank)
        work = plan_work(folder, last, contents, rank)
        if copy:
            copy(work)
    if rank == 0:
        _add_small(work, contents, told, format)
    return work, last


def _add_small(work: Work, contents: Contents, told: Sequence[Any], format: Checkpoint) -> None:
    """What is neither weights nor state of an optimizer, with what each rank told of it; rank 0 only."""
    contents.values["random"] = [random for _, (random, _), _ in told]
    for _, (_, tensors), scattered in told:
        contents.small.update(tensors)
        contents.add_scattered(*scattered)
    work.small, files = _small_files(contents.small, contents.values, format)
    work.files.extend(files)


def _told(looked: tuple[Any, Any, T]) -> T:
    return looked[2]


def plan_layout(
    tables: Sequence[Sequence[Held]], names: Sequence[str], format: Checkpoint, largest: int, rank: int
) -> Layout:
    """The layout of models and optimizers, from what each rank holds; `names` are of groups, which may be empty."""
    groups = {held.group: list[Entry]() for table in tables for held in table} | all_entries(tables)
    layouts = {
        group: format.layout(group, groups.get(group, []), largest) for group in {**dict.fromkeys(names), **groups}
    }
    files = [file for files in layouts.values() for file in files]
    places = {(group, p.entry.name): p for group, files in layouts.items() for file in files for p in file.places}
    own = [(places[duty.held.group, duty.held.entry.name], duty) for duty in duties(tables, rank)]
    return Layout(names, tables[rank], files, own)


def plan_work(folder: Path, layout: Layout, contents: Contents, rank: int) -> Work:
    """The files of models and optimizers, which rank 0 makes, and this process's pieces of them."""
    pieces = [
        Piece(place, duty, contents.tensors[duty.held.group][duty.held.entry.name][0]) for place, duty in layout.duties
    ]
    return Work(folder, list(layout.files) if rank == 0 else [], pieces)


def write(
    work: Work, finish: Callable[[list[Range]], None], exchange: Exchange, begin: Callable[[], None] = lambda: None
) -> None:
    """Write everything beside the folder, wait until it is on disk, and let rank 0 finish; all ranks.

    Before anything is written, rank 0 begins. Raises CheckpointError on all ranks if any of them fails, and leaves
    nothing behind.
    """

    with ExitStack() as open_folder:

        def create() -> list[Range]:
            begin()
            open_folder.enter_context(storage.made_aside(work.folder))
            return _create(work)

        heads = exchange.from_main(create)
        written = exchange.together(lambda: _write_pieces(work))
        exchange.from_main(lambda: finish([*heads, *(r for ranges in written for r in ranges)]))


def _create(work: Work) -> list[Range]:
    """Make all files, with what stands before their tensors; rank 0 only."""
    with Writer(storage.aside(work.folder)) as writer:
        for file in work.files:
            writer.create(file.name, file.size, file.head)
        return writer.written


def _write_pieces(work: Work) -> list[Range]:
    """Write this process's bytes and wait until they are on disk; returns what was written."""
    with Writer(storage.aside(work.folder)) as writer:
        pieces = [*work.pieces, *work.small]
        for piece in sorted(pieces, key=lambda piece: (piece.place.file, piece.place.offset)):  # as they will lie
            data = piece.bytes().numpy().data
            done = 0
            for geometry in piece.geometries():
                part = data[done : done + geometry.total]
                writer.write(piece.place.file, geometry, part, piece.place.entry.name)
                done += geometry.total
        for file in work.files:
            writer.open(file.name)  # also those of which this process wrote nothing but the head
        writer.flush()
        return writer.written


def _small_files(
    small: Mapping[str, Tensor], values: Mapping[str, Any], format: Checkpoint
) -> tuple[list[Piece], list[File]]:
    """The files of what is neither weights nor state of an optimizer; rank 0 only."""
    entries = [entry_of(name, tensor) for name, tensor in small.items()]
    files = list(format.layout(SMALL, entries, LARGEST_FILE))
    pieces = []
    for place in (place for file in files for place in file.places):
        tensor = small[place.entry.name]
        held = Held(SMALL, place.entry, box_of(place.entry.name, tensor), True)
        pieces.append(Piece(place, Duty(held, 0, held.size), tensor))
    text = (json.dumps(values, indent=1, allow_nan=False) + "\n").encode()
    return pieces, [*files, File(VALUES, text, len(text))]
