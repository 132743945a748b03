"""Collective calls over nested structures. All ranks of the group call each of them together.

What the ranks bring is compared first, because torch does not: a mismatch hangs, aborts, or returns garbage.
A group of None stands for a process on its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..errors import CollectiveError
from .divided.tensor import whole_of
from .nested import leaves, map_tensors, tensors
from .shards import whole_tensor

T = TypeVar("T")

_CARRIERS = {1: torch.uint8, 2: torch.float16, 4: torch.int32, 8: torch.int64}
"""By bytes, as what an element is sent that only has to arrive: backends know few dtypes, and no float8."""


def is_tensors(value: Any) -> bool:
    """Whether a value is made of tensors and containers of them alone, at least one."""
    found = [leaf for _, leaf in leaves(value)]
    return bool(found) and all(isinstance(leaf, Tensor) for leaf in found)


def gather(value: Any, group: ProcessGroup | None) -> Any:
    """Concatenate each tensor over the ranks along its first dimension; a scalar becomes a vector.

    [B, ...] on each of n ranks -> [n * B, ...] on all. Raises CollectiveError where shapes or dtypes differ.
    """
    value = map_tensors(_whole, value)
    _agree("gather", value, group, _shape_and_dtype)
    return map_tensors(lambda t: torch.cat(_all_gather(_vector(t), group)), value)


def gather_counted(value: Any, counts: Sequence[int], group: ProcessGroup | None, most: int | None = None) -> Any:
    """Like `gather`, but rank r brings `counts[r]` rows that matter; what else it brings is dropped.

    A scalar comes once from each rank that has rows. Raises CollectiveError on all ranks for fewer rows than matter,
    and for more than `most`, which are no repeated ones.
    """
    largest, mine = max(*counts, 1), counts[0 if group is None else group.rank()]

    def misfit(tensor: Tensor) -> str:
        rows = len(tensor) if tensor.dim() else mine
        return f", {rows} rows for {mine} samples" if rows < mine or rows > max(most or rows, mine) else ""

    def facts(tensor: Tensor) -> str:
        return (f"rows of {list(tensor.shape[1:])}" if tensor.dim() else "one") + f" {tensor.dtype}{misfit(tensor)}"

    def collect(tensor: Tensor) -> Tensor:
        size, rows = (largest, counts) if tensor.dim() else (1, [min(count, 1) for count in counts])
        tensor = _vector(tensor)
        parts = _all_gather(_padded(tensor, 0, size) if len(tensor) < size else tensor[:size], group)
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    value = map_tensors(_whole, value)
    _agree("gather_for_metrics", value, group, facts)
    if wrong := [misfit(tensor) for _, tensor in tensors(value) if misfit(tensor)]:
        raise CollectiveError(
            f"gather_for_metrics: expected a row for each sample of the current batch{wrong[0]}; bring one per "
            "sample, or call gather()"
        )
    return map_tensors(collect, value)


def reduce(
    value: Any, group: ProcessGroup | None, reduction: Literal["mean", "sum", "none"] = "mean", scale: float = 1.0
) -> Any:
    """Sum or average each tensor over the ranks, times `scale`. Raises CollectiveError as `gather` does."""
    if reduction not in ("mean", "sum", "none"):
        raise CollectiveError(f"reduce: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")

    def combine(tensor: Tensor) -> Tensor:
        result = tensor.detach().clone()
        if group is not None and reduction != "none":
            dist.all_reduce(result, group=group)
        factor = scale / group.size() if group is not None and reduction == "mean" else scale
        return result if factor == 1.0 else result * factor

    value = map_tensors(_whole, value)
    _agree("reduce", value, group, _shape_and_dtype)
    return map_tensors(combine, value)


def pad_across_processes(
    value: Any, group: ProcessGroup | None, dim: int = 0, pad_index: int = 0, pad_first: bool = False
) -> Any:
    """Pad each tensor along `dim` with `pad_index` to the longest of the ranks. Raises CollectiveError as `gather`."""

    def pad(tensor: Tensor) -> Tensor:
        if tensor.dim() <= dim:
            return tensor
        sizes = gather_object(tensor.shape[dim], group)
        return _padded(tensor, dim, max(sizes), pad_index, pad_first)

    def shape(tensor: Tensor) -> str:
        shape = ["*" if place == dim % tensor.dim() else str(size) for place, size in enumerate(tensor.shape)]
        return f"[{', '.join(shape)}] {tensor.dtype}"

    value = map_tensors(whole_of, value)
    _agree("pad_across_processes", value, group, shape)
    return map_tensors(pad, value)


def broadcast(value: Any, group: ProcessGroup | None, source: int = 0) -> Any:
    """What rank `source` of the group has, on all; tensors keep their device. Shapes and dtypes must agree."""

    def send(tensor: Tensor) -> Tensor:
        result = tensor.detach().clone().contiguous()
        if group is not None:
            dist.broadcast(result, group=group, group_src=source)
        return result

    value = map_tensors(whole_of, value)
    _agree("broadcast", value, group, _shape_and_dtype)
    return map_tensors(send, value)


def broadcast_in_place(values: Sequence[Tensor], group: ProcessGroup, source: int = 0) -> None:
    """Overwrite tensors with those of rank `source`; few messages, each as large as two of them may take memory."""
    sent = [value.detach().view(_CARRIERS.get(value.itemsize, value.dtype)) for value in values]
    if sent:
        dist._broadcast_coalesced(group, sent, 25 << 20, source)  # type: ignore[attr-defined]


def gather_object(value: T, group: ProcessGroup | None) -> list[T]:
    """What each rank has, as a list by rank, on all ranks; anything that can be pickled."""
    if group is None:
        return [value]
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, value, group=group)
    return found


def broadcast_object(value: T, group: ProcessGroup | None, source: int = 0) -> T:
    """What rank `source` of the group has, on all ranks; anything that can be pickled."""
    if group is None:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, group=group, group_src=source)
    return box[0]  # type: ignore[no-any-return]


def _agree(call: str, value: Any, group: ProcessGroup | None, facts: Callable[[Tensor], str]) -> None:
    """Raise CollectiveError on every rank, with what each brought, unless the facts of all tensors are the same."""
    brought = [f"{path} {facts(tensor)}".lstrip() for path, tensor in tensors(value)]
    if not brought:
        raise CollectiveError(f"{call}: expected tensors, or containers of them, got {type(value).__name__}")
    if group is None:
        return
    first = next(tensor for _, tensor in tensors(value))
    checksum = torch.tensor([zlib.crc32("\n".join(brought).encode())], device=first.device)
    if len({int(c) for c in torch.cat(_all_gather(checksum, group)).tolist()}) > 1:
        each = "; ".join(f"rank {rank} has {', '.join(b)}" for rank, b in enumerate(gather_object(brought, group)))
        raise CollectiveError(f"{call}: the processes brought different tensors: {each}")


def _shape_and_dtype(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def _all_gather(tensor: Tensor, group: ProcessGroup | None) -> list[Tensor]:
    if group is None:
        return [tensor]
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor, group=group)
    return parts


def _whole(tensor: Tensor) -> Tensor:
    return whole_tensor(whole_of(tensor).detach())


def _vector(tensor: Tensor) -> Tensor:
    return tensor.reshape(1) if tensor.dim() == 0 else tensor


def _padded(tensor: Tensor, dim: int, length: int, fill: float = 0, first: bool = False) -> Tensor:
    missing = length - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    padding = tensor.new_full(shape, fill)
    return torch.cat([padding, tensor] if first else [tensor, padding], dim)
