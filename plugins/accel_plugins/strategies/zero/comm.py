"""Collectives for backends whose own do more than they need to: a reduce-scatter that is an all-reduce underneath."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

_LOT_BYTES = 32 << 20
"""What is received at once, before it is added up, and what is at most kept to be used again: bounds memory."""


class Scratch:
    """Memory that is handed out again once nobody refers to it.

    What a CPU frees goes back to the system (see `accel.launch.environment.ALLOCATOR`), which fills each page with
    zeros before it gives it out again: that takes longer than to copy gradients or parameters into it.
    """

    def __init__(self) -> None:
        self._held: list[torch.UntypedStorage] = []

    def take(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[count], of any content. It is new if it is large, or not on the CPU: other allocators keep what is freed."""
        if device.type != "cpu" or count * dtype.itemsize > _LOT_BYTES:
            return torch.empty(count, dtype=dtype, device=device)
        idle = [storage for storage in self._held if torch._C._storage_Use_Count(storage._cdata) == 1]
        fits = next((storage for storage in idle if storage.nbytes() >= count * dtype.itemsize), None)
        if fits is None:
            small = {id(storage) for storage in idle[:1]}  # whose place the new one takes
            fits = torch.empty(count, dtype=dtype).untyped_storage()
            self._held = [*(storage for storage in self._held if id(storage) not in small), fits]
        return torch.empty(0, dtype=dtype).set_(fits, 0, (count,))  # type: ignore[call-overload,no-any-return]


class ScratchAllGather(DefaultAllGather):
    """Torch's own, into memory that is used again: it is copied from there into each parameter's own place."""

    def __init__(self, scratch: Scratch) -> None:
        self.scratch = scratch

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.scratch.take(int(size[0]), dtype, device)


class AllToAllReduceScatter(ReduceScatter):
    """Every rank sends each other rank its part, and adds up what it gets: half of an all-reduce's bytes.

    gloo has no reduce-scatter of its own: torch runs an all-reduce and keeps a part. The sum is taken in the order of
    the ranks, so that it does not depend on timing.
    """

    def __init__(self, scratch: Scratch, shards: int) -> None:
        self.scratch, self.shards = scratch, shards
        self._sent = 0

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Torch asks for memory to send from, and then to reduce into: the latter stays as the gradient."""
        count = int(size[0])
        if count * self.shards == self._sent:
            self._sent = 0
            return torch.empty(count, dtype=dtype, device=device)
        self._sent = count
        return self.scratch.take(count, dtype, device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        parts, output = input_tensor.view(group.size(), -1), output_tensor.view(-1)
        lot = max(_LOT_BYTES // (group.size() * input_tensor.element_size()), 1)
        for start in range(0, output.numel(), lot):
            sent = parts[:, start : start + lot].contiguous()
            received = self.scratch.take(sent.numel(), sent.dtype, sent.device).view_as(sent)
            dist.all_to_all_single(received, sent, group=group)
            torch.sum(received, 0, out=output[start : start + lot])
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(group.size())


def improve_collectives(
    modules: Iterable[FSDPModule], group: dist.ProcessGroup, device: torch.device, shards: int
) -> None:
    """Replace the collectives of a model's modules that their backend has no good ones for."""
    backend: str = group._get_backend(device).name()
    if backend == "gloo":
        scratch = Scratch()
        for module in modules:
            module.set_custom_all_gather(ScratchAllGather(scratch))
            module.set_custom_reduce_scatter(AllToAllReduceScatter(scratch, shards))
