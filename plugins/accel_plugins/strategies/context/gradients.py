"""The mean over processes of gradients that each computed on its own positions, in few large messages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from accel.errors import PrepareError
from accel.runtime.shards import held_part, like_part

_LOT_BYTES = 32 << 20
"""What is sent at once: bounds the memory that it takes."""


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], group: ProcessGroup, device: torch.device) -> None:
    """Replace `.grad` by its mean over the group; a gradient that some processes lack counts as zeros there.

    All processes of the group call it, after the data axis has exchanged. One that all lack stays None.
    """
    for lot in _lots(parameters):
        gradients = [_gradient(parameter) for parameter in lot]
        present = [0.0 if gradient is None else 1.0 for gradient in gradients]
        parts = [torch.zeros_like(held_part(p)) if g is None else g for p, g in zip(lot, gradients, strict=True)]
        total = torch.cat([*(part.flatten() for part in parts), parts[0].new_tensor(present)]).to(device)
        dist.all_reduce(total, group=group)
        means = total.div_(group.size()).split([*(part.numel() for part in parts), len(lot)])  # type: ignore[no-untyped-call]
        anywhere = means[-1].tolist()
        for parameter, part, mean, some in zip(lot, parts, means, anywhere, strict=False):
            part.copy_(mean.view_as(part))
            if parameter.grad is None and some:
                parameter.grad = like_part(part, parameter)


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    if parameter.grad is None:
        return None
    if parameter.grad.layout is not torch.strided:
        raise PrepareError(
            f"strategies.context: a gradient of shape {tuple(parameter.shape)} is sparse, which cannot be averaged; "
            "make its embedding with sparse=False"
        )
    return held_part(parameter.grad)


def _lots(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Those that train, by dtype and in lots of about so many bytes; the same on all processes of the group."""
    lots: dict[torch.dtype, list[nn.Parameter]] = defaultdict(list)
    size: dict[torch.dtype, int] = defaultdict(int)
    for parameter in parameters:
        if parameter.requires_grad:
            dtype = parameter.dtype if parameter.grad is None else parameter.grad.dtype
            lots[dtype].append(parameter)
            size[dtype] += held_part(parameter).nbytes
            if size[dtype] >= _LOT_BYTES:
                yield lots.pop(dtype)
                size[dtype] = 0
    yield from lots.values()
