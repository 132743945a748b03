"""Collective calls over all processes, for code that has no `Accelerator` at hand. All ranks make each call together.

Each takes any nesting of tensors and raises CollectiveError where the processes brought different shapes or dtypes.
Before the processes have met, through an `Accelerator` or a `PartialState`, each stands for itself.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..errors import CollectiveError
from ..runtime import collectives
from ..runtime.nested import map_tensors
from ..runtime.points import meeting
from ..runtime.world import World


@meeting
def gather(tensor: Any) -> Any:
    """Concatenate tensors over the processes, on all of them: [B, ...] -> [n * B, ...]."""
    return collectives.gather(tensor, _everyone("gather"))


@meeting
def gather_object(value: Any) -> Any:
    """One list of the items of each process's list, on all processes; anything that can be pickled."""
    parts = collectives.gather_object(value, _everyone("gather_object"))
    return [item for part in parts for item in part] if isinstance(value, (list, tuple)) else parts


@meeting
def reduce(tensor: Any, reduction: Literal["mean", "sum", "none"] = "mean", scale: float = 1.0) -> Any:
    """Average or sum tensors over the processes, on all of them, times `scale`."""
    return collectives.reduce(tensor, _everyone("reduce"), reduction, scale)


@meeting
def broadcast(tensor: Any, from_process: int = 0) -> Any:
    """The tensors of one process, on all."""
    return collectives.broadcast(tensor, _everyone("broadcast"), from_process)


@meeting
def broadcast_object_list(object_list: list[Any], from_process: int = 0) -> list[Any]:
    """Replace the items of a list, in place, with those of one process; anything that can be pickled."""
    object_list[:] = collectives.broadcast_object(list(object_list), _everyone("broadcast_object_list"), from_process)
    return object_list


@meeting
def pad_across_processes(tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
    """Pad tensors along `dim` with `pad_index` to the longest of any process."""
    return collectives.pad_across_processes(tensor, _everyone("pad_across_processes"), dim, pad_index, pad_first)


@meeting
def wait_for_everyone() -> None:
    """Return once all processes have called this."""
    if _everyone("wait_for_everyone") is not None:
        dist.barrier()


def send_to_device(tensor: Any, device: torch.device | str | int, non_blocking: bool = False) -> Any:
    """The same nesting with each tensor on `device`; any rank on its own."""
    return map_tensors(lambda t: t.to(device, non_blocking=non_blocking), tensor)


def _everyone(call: str) -> ProcessGroup | None:
    """All processes; None for a world of one. Raises CollectiveError if the processes have not met yet."""
    world = World.from_environment()
    if world.size > 1 and not dist.is_initialized():
        raise CollectiveError(
            f"{call}: the {world.size} processes have not met yet; make an Accelerator or a PartialState first"
        )
    return world.group()
