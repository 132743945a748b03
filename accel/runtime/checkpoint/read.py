"""Reading a checkpoint: each process only the bytes of its own parts, into the objects that it has prepared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...interfaces import Entry, Place
from ...storage import Geometry, Reader
from .parts import Box, as_bytes, box_of, geometries, item_size, local_of


def read_into(reader: Reader, place: Place, tensor: Tensor) -> None:
    """Fill this process's part of a tensor of the saved shape; converts to its dtype and device."""
    local, box = local_of(tensor), box_of(place.entry.name, tensor)
    if local.device.type == "cpu" and local.is_contiguous() and local.dtype == _dtype(place.entry):
        _fill(reader, place, box, local)
        return
    local.copy_(read_box(reader, place, box))


def read_box(reader: Reader, place: Place, box: Box) -> Tensor:
    """A part of a saved tensor, as it was saved, on the CPU."""
    part = torch.empty(box.shape, dtype=_dtype(place.entry))
    _fill(reader, place, box, part)
    return part


def read_whole(reader: Reader, place: Place) -> Tensor:
    """A saved tensor, on the CPU."""
    return read_box(reader, place, Box((0,) * len(place.entry.shape), place.entry.shape))


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of a group, each read when it is asked for."""

    def __init__(self, folder: Path, places: Mapping[str, Place]) -> None:
        self.folder, self.places = folder, places

    def __getitem__(self, name: str) -> Tensor:
        with Reader(self.folder) as reader:
            return read_whole(reader, self.places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def _fill(reader: Reader, place: Place, box: Box, local: Tensor) -> None:
    data = as_bytes(local).numpy().data
    done = 0
    for g in geometries(place.entry.shape, box, item_size(place.entry), 0, len(data)):
        reader.read(
            place.file, Geometry(g.offset + place.offset, g.size, g.count, g.stride), data[done : done + g.total]
        )
        done += g.total


def _dtype(entry: Entry) -> torch.dtype:
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{entry.name}: torch {torch.__version__} has no {entry.dtype}")
    return dtype
