"""What a loop measures: each sample of the data once, whatever the processes had to repeat to keep in step."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from . import collectives
from .loader import PreparedLoader
from .nested import leaves


def gather_for_metrics(
    value: Any, loader: PreparedLoader | None, group: ProcessGroup | None, as_objects: bool = False
) -> Any:
    """Concatenate over the processes what counts of the current batch of `loader`; see `Accelerator`. All ranks."""
    counts = _counts(value, loader, group) if loader is not None else None
    most = None if loader is None or loader.whole_batches else loader.batch_size  # some loops repeat a loss so often
    if as_objects or not collectives.is_tensors(value):
        return _gather_objects(value, counts, group)
    if counts is None:
        return collectives.gather(value, group)
    return collectives.gather_counted(value, counts, group, most)


def _counts(value: Any, loader: PreparedLoader, group: ProcessGroup | None) -> tuple[int, ...]:
    """How many items of what each process brings count.

    Where the dataset makes the batches (`batch_size=None`), the loader counts whole batches: all of it or nothing.
    """
    if not loader.whole_batches:
        return loader.counts
    lengths = collectives.gather_object(_length(value), group)
    return tuple(length * bool(count) for length, count in zip(lengths, loader.counts, strict=True))


def _length(value: Any) -> int:
    if isinstance(value, list) and not collectives.is_tensors(value):
        return len(value)
    first = next((leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor)), None)
    return first.shape[0] if first is not None and first.dim() else 1


def _gather_objects(value: Any, counts: tuple[int, ...] | None, group: ProcessGroup | None) -> list[Any]:
    parts = collectives.gather_object(value, group)
    if not all(isinstance(part, list) for part in parts):
        return [part for part, count in zip(parts, counts or [1] * len(parts), strict=True) if count]
    return [item for rank, part in enumerate(parts) for item in (part if counts is None else part[: counts[rank]])]
