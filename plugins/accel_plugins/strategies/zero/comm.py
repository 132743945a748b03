"""A reduce-scatter that sends each byte once, for backends whose own is an all-reduce underneath."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

_LOT_BYTES = 32 << 20
"""What is received at once, before it is added up; bounds the memory that a large group needs."""


class AllToAllReduceScatter(ReduceScatter):
    """Every rank sends each other rank its part, and adds up what it gets: half of an all-reduce's bytes.

    gloo has no reduce-scatter of its own: torch runs an all-reduce and keeps a part. The sum is taken in the order of
    the ranks, so that it does not depend on timing.
    """

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        parts, output = input_tensor.view(group.size(), -1), output_tensor.view(-1)
        lot = max(_LOT_BYTES // (group.size() * input_tensor.element_size()), 1)
        for start in range(0, output.numel(), lot):
            sent = parts[:, start : start + lot].contiguous()
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent, group=group)
            torch.sum(received, 0, out=output[start : start + lot])
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(group.size())


def reduce_scatter_for(group: dist.ProcessGroup, device: torch.device) -> ReduceScatter | None:
    """The reduce-scatter to use in place of the backend's own; None where that one is good."""
    backend: str = group._get_backend(device).name()
    return AllToAllReduceScatter() if backend == "gloo" else None
