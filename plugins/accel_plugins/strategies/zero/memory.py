"""Memory for a group's gathered parameters.

What the allocator takes from the system comes in pages of 4 KiB, each filled with zeros at its first use, which costs
more than gathering does. A huge page of 2 MiB costs an eighth of as many small ones. But the system uses them only
between their borders, and begins a mapping at a border only if its length is a multiple of a huge page.

Where blocks are freed after each use, the next takes the memory of the one before. Where all are whole at once anyway,
memory is kept, and what this process holds of each parameter lies in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.dlpack import from_dlpack

LINE_BYTES = 64
"""Where a tensor may begin."""

_HUGE_BYTES = 2 << 20
"""A huge page."""

_HEADER_BYTES = 4096
"""What the allocator at most adds to what it is asked for, when it has the system map pages of their own."""


def _in_huge_pages(size: int) -> int:
    """The bytes to ask for in place of `size`, so that what the system maps is a multiple of a huge page."""
    if size < _HUGE_BYTES // 2:
        return size
    return -(-(size + _HEADER_BYTES) // _HUGE_BYTES) * _HUGE_BYTES - _HEADER_BYTES


class Spare:
    """What a storage has given back, for the next one that wants as much: no more than that of one group."""

    def __init__(self) -> None:
        self._storage: torch.UntypedStorage | None = None

    def fill(self, storage: torch.UntypedStorage, size: int) -> None:
        """Give an empty storage memory of `size` bytes, whatever is in it."""
        spare, self._storage = self._storage, None
        if spare is not None and spare.size() == size:
            storage._swap_data_ptr_(spare)  # type: ignore[attr-defined]
        else:
            del spare
            storage.resize_(size)

    def empty(self, storage: torch.UntypedStorage) -> None:
        """Take a storage's memory."""
        if hasattr(storage, "_swap_data_ptr_"):  # torch 2.13
            self._storage = torch.empty(0, dtype=torch.uint8).untyped_storage()
            self._storage._swap_data_ptr_(storage)  # type: ignore[attr-defined]
        else:
            storage.resize_(0)

    def drop(self) -> None:
        """Give back what is spare to the system."""
        self._storage = None


class GatheredMemory:
    """One memory for a group's gathered parameters, of which torch's record of each has a view.

    When torch divides the group again, the memory becomes the `spare`; if there is none, it stays and holds the parts
    of this process, the one of `rank` among the `shards`.
    """

    def __init__(
        self, parameters: list[Any], shards: int, rank: int, device: torch.device, spare: Spare | None
    ) -> None:
        sizes = [_make_whole(parameter, shards, device) for parameter in parameters]
        self.spare, self.size = spare, _in_huge_pages(sum(sizes)) if spare else sum(sizes)
        self.storage = torch.empty(0, dtype=torch.uint8, device=device).untyped_storage()
        self.allocate()
        memory = torch.empty(0, dtype=torch.uint8, device=device).set_(self.storage)
        for parameter, place in zip(parameters, torch.split(memory[: sum(sizes)], sizes), strict=True):
            _move(parameter, place)
            parameter.free_unsharded_param = self.free
            if not spare:
                _move_part(parameter, parameter.all_gather_outputs[0].view(shards, -1)[rank])

    def allocate(self) -> None:
        """Have memory, if there is none."""
        if not self.storage.size():
            (self.spare or Spare()).fill(self.storage, self.size)

    def free(self) -> None:
        """Have none, unless it is kept; torch calls it for each parameter."""
        if self.spare and self.storage.size():
            self.spare.empty(self.storage)


def _make_whole(parameter: Any, shards: int, device: torch.device) -> int:
    """Let torch make the whole parameter; returns how many bytes it takes, up to where another may begin."""
    [part] = parameter.all_gather_inputs
    parameter.init_all_gather_outputs([part.numel()], [part.dtype], shards, device)
    parameter.init_unsharded_param()
    size: int = parameter.all_gather_outputs[0].nbytes
    return -(-size // LINE_BYTES) * LINE_BYTES


def _move(parameter: Any, memory: Tensor) -> None:
    """Let the whole parameter, and what torch gathers for it, be in this memory."""
    [output] = parameter.all_gather_outputs
    moved = memory[: output.nbytes].view(output.dtype)
    whole = parameter._unsharded_param
    local = whole._local_tensor if isinstance(whole, DTensor) else whole
    local.data = moved.as_strided(local.shape, local.stride(), moved.storage_offset())
    parameter.all_gather_outputs = [moved.data]  # `data`: autograd need not know when it changes


def _move_part(parameter: Any, place: Tensor) -> None:
    """Let what this process holds of the parameter be at its place [n] in the whole, if it is gathered as it is.

    It is a tensor of its own on the same memory: who copies or saves it would else do so with the whole.
    """
    held, local = parameter._sharded_param_data, parameter.sharded_param._local_tensor
    if held.dtype != place.dtype or not held.numel():
        return
    place.copy_(held)
    own = from_dlpack(place.view(torch.uint8)).view(held.dtype)
    local.data = own.as_strided(local.shape, local.stride())
    parameter._sharded_param_data = own
