"""Reading a checkpoint: each process only the bytes of its own parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ...errors import CheckpointError, DamagedError
from ...interfaces import Entry, Place
from ...storage import LATER, CheckedReader, Geometry, Problem, Range, Reader
from .exchange import Exchange
from .memory import fresh
from .parts import Box, as_bytes, geometries, item_size

T = TypeVar("T")


class Parts:
    """The parts of saved tensors that this process wants.

    They are asked for one by one, then all of them are read and checked by `fill`, and only when that has gone well
    on all ranks, what is in use is replaced by `replace`. `ranges` are those whose checksums are to be compared; none,
    for a folder that was not written by us.
    """

    def __init__(self, folder: Path, ranges: Sequence[Range] = ()) -> None:
        self.folder = folder
        self._reader = CheckedReader(folder, ranges)
        self._asked: list[tuple[int, bytes]] = []
        """For each rank its machine, by the first rank there, and what it knows of each range's check."""

    def part(self, place: Place, box: Box, local: Tensor | None) -> Tensor:
        """A part of a tensor as it was saved, on the CPU: `local` itself after `replace`, if it can hold it.

        Else it is a fresh one, which is empty before `fill`.
        """
        used = local is not None and _holds(local, place.entry, box)
        part = local if local is not None and used else fresh(box.shape, _dtype(place.entry))
        data = as_bytes(part).numpy().data
        done = 0
        for g in _joined(geometries(place.entry.shape, box, item_size(place.entry), 0, len(data))):
            offset = place.offset + g.offset
            self._reader.want(place.file, replace(g, offset=offset), data[done : done + g.total], used)
            done += g.total
        return part

    def whole(self, place: Place) -> Tensor:
        """All of a tensor; empty before `fill`."""
        return self.part(place, Box((0,) * len(place.entry.shape), place.entry.shape), None)

    def ask(self, plan: Callable[[], T], exchange: Exchange) -> T:
        """Let each rank plan, which asks for its parts, and return its own result; all ranks."""
        machine = exchange.world.rank - exchange.world.local_rank
        result, self._asked = exchange.tell(plan, lambda _: (machine, bytes(self._reader.checks)))
        return result

    def fill(self, exchange: Exchange) -> None:
        """Read and check the parts; all ranks, after `ask`.

        Of what goes into memory in use, and of what no process wants, each checks a share. Raises DamagedError on all
        ranks, naming the file and the tensor, and then nothing in use has changed.
        """
        mine = self._checks_of(exchange.world.rank)
        found = exchange.together(lambda: self._reader.read(mine)[:1], DamagedError)
        self._raise_for(problem for some in found for problem in some)

    def _checks_of(self, rank: int) -> list[int]:
        """The ranges that a rank checks for others too: for those of its machine, and of what nobody wants."""
        machines = [machine for machine, _ in self._asked]
        here = [other for other, machine in enumerate(machines) if machine == machines[rank]]
        marks = list(zip(*(checks for _, checks in self._asked), strict=True))
        later = [i for i, of in enumerate(marks) if LATER in (of[other] for other in here)]
        others = [i for i, of in enumerate(marks) if not any(of)]
        share = self._reader.share
        return share(later, here.index(rank), len(here)) + share(others, rank, len(machines))

    def replace(self) -> None:
        """Read what goes into memory in use; raises DamagedError if files have changed since `fill`.

        If they had before this, nothing in use has changed.
        """
        self._raise_for(self._reader.replace())

    def _raise_for(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            raise DamagedError(f"{self.folder / str(problem)}; load another checkpoint")


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of a group that has been checked, each read when it is asked for."""

    def __init__(self, folder: Path, places: Mapping[str, Place]) -> None:
        self.folder, self.places = folder, places

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        tensor = torch.empty(place.entry.shape, dtype=_dtype(place.entry))
        with Reader(self.folder) as reader:
            reader.read(place.file, Geometry(place.offset, place.size), as_bytes(tensor).numpy().data)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def _joined(stretches: Iterable[Geometry]) -> Iterator[Geometry]:
    """The same bytes with neighbours as one, so that a range that lies across two of them is read once."""
    last: Geometry | None = None
    for g in stretches:
        if last is not None and last.count == g.count == 1 and last.offset + last.size == g.offset:
            last = Geometry(last.offset, last.size + g.size)
            continue
        if last is not None:
            yield last
        last = g
    if last is not None:
        yield last


def _holds(local: Tensor, entry: Entry, box: Box) -> bool:
    """Whether bytes of a saved tensor can be read into this one's memory."""
    alike = tuple(local.shape) == box.shape and local.dtype == _dtype(entry)
    return alike and local.device.type == "cpu" and local.is_contiguous()


def _dtype(entry: Entry) -> torch.dtype:
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{entry.name}: torch {torch.__version__} has no {entry.dtype}")
    return dtype
