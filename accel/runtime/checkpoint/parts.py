"""Which part of a whole tensor this process holds, and where its bytes are in the whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ...errors import CheckpointError
from ...interfaces import Entry
from ...storage import CHUNK, Geometry
from ..shards import held_part


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor: where it begins and how far it reaches, along each dim."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Elements in the box."""
        return math.prod(self.shape)


def entry_of(name: str, tensor: Tensor) -> Entry:
    """The facts of the whole tensor of which this process holds a part. Raises CheckpointError for a sparse one."""
    if tensor.layout is not torch.strided:
        raise CheckpointError(f"{name}: a tensor of layout {tensor.layout} cannot be kept; keep to_dense() of it")
    return Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def item_size(entry: Entry) -> int:
    """Bytes of one element."""
    dtype: torch.dtype = getattr(torch, entry.dtype)
    return dtype.itemsize


def box_of(name: str, tensor: Tensor) -> Box:
    """The part that this process holds; all of it, unless it is a DTensor. Raises CheckpointError for partial sums."""
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.dim(), tuple(tensor.shape))
    if any(placement.is_partial() for placement in tensor.placements):
        raise CheckpointError(f"{name}: holds sums that are not complete: {tensor.placements}; redistribute it first")
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Box(tuple(offset), tuple(shape))


def local_of(tensor: Tensor) -> Tensor:
    """What this process holds, as a plain tensor that shares its memory."""
    return held_part(tensor).resolve_conj().resolve_neg()


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as its bytes: any shape -> [bytes]."""
    return tensor.reshape(-1).view(torch.uint8)


def geometries(whole: Sequence[int], box: Box, size: int, start: int, stop: int) -> Iterator[Geometry]:
    """Where bytes `start` to `stop` of a box are in the whole tensor, both in row-major order; one after another.

    `size` is that of an element. None is larger than CHUNK; runs at equal distances come together as one.
    """
    pending: Geometry | None = None
    for offset, length in _runs(whole, box, size, start, stop):
        if pending is not None and (joined := _join(pending, offset, length)):
            pending = joined
            continue
        if pending is not None:
            yield pending
        pending = Geometry(offset, length)
    if pending is not None:
        yield pending


def _join(first: Geometry, offset: int, length: int) -> Geometry | None:
    """The runs so far and one more, if they are alike and stay small."""
    stride = first.stride if first.count > 1 else offset - first.offset
    fits = length == first.size and first.total + length <= CHUNK
    if fits and offset == first.offset + first.count * stride:
        return Geometry(first.offset, first.size, first.count + 1, stride)
    return None


def _runs(whole: Sequence[int], box: Box, size: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The contiguous pieces of those bytes: offset in the whole and length."""
    strides = [math.prod(whole[dim + 1 :]) * size for dim in range(len(whole))]
    divided = max((dim for dim, length in enumerate(whole) if box.shape[dim] != length), default=0)
    run = math.prod(box.shape[divided:]) * size
    while start < stop:
        index, within = divmod(start, run)
        offset = sum(o * stride for o, stride in zip(box.offset, strides, strict=True)) + within
        for dim in range(divided - 1, -1, -1):
            index, place = divmod(index, box.shape[dim])
            offset += place * strides[dim]
        length = min(run - within, stop - start, CHUNK)
        yield offset, length
        start += length
