"""Memory that is taken and given back several times in a step, for a group's gathered parameters.

What the allocator takes from the system for one tensor comes in pages of 4 KiB, each filled with zeros at its first
use, which costs more than gathering does. A huge page of 2 MiB costs an eighth of as many small ones. But the system
uses them only between their borders, and begins a mapping at a border only if its length is a multiple of a huge page.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

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


class GatheredMemory:
    """One memory for a group's gathered parameters, of which torch's record of each has a view.

    Torch frees it through any of these views, when it divides the group again.
    """

    def __init__(self, parameters: list[Any], shards: int, device: torch.device) -> None:
        sizes = [_make_whole(parameter, shards, device) for parameter in parameters]
        self.size = _in_huge_pages(sum(sizes))
        memory = torch.empty(self.size, dtype=torch.uint8, device=device)
        self.storage = memory.untyped_storage()
        for parameter, part in zip(parameters, torch.split(memory[: sum(sizes)], sizes), strict=True):
            _move(parameter, part)

    def allocate(self) -> None:
        """Have memory, if torch has freed it."""
        if self.storage.size() != self.size:
            self.storage.resize_(self.size)


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
