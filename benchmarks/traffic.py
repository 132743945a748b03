"""Counts the bytes that this process's collectives have to send."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """While entered, adds up the least that any algorithm sends for the collectives called, in bytes.

    What a backend really sends can be more: gloo's reduce-scatter is an all-reduce underneath. Where ranks send
    different amounts (a broadcast), it is the mean over them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.among: dict[int, float] = defaultdict(float)
        """What was sent, by the number of processes that took part."""

    @property
    def sent(self) -> float:
        """What was sent in all."""
        return sum(self.among.values())

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if function.namespace == "c10d":
            self._count(function._schema.name.partition("::")[2], arguments)
        return function(*arguments, **(options or {}))

    def _count(self, name: str, arguments: tuple[Any, ...]) -> None:
        if (cost := _COSTS.get(name)) is not None:
            groups = [argument for argument in arguments if hasattr(argument, "_type")]
            processes = _processes(groups[0])
            self.among[processes] += cost(max(map(_size, arguments)), processes)


def _size(argument: Any) -> int:
    """Bytes of a tensor, or of a list of them."""
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_size, argument)) if isinstance(argument, (list, tuple)) else 0


def _processes(group: Any) -> int:
    unboxed: dist.ProcessGroup = dist.ProcessGroup.unbox(group)
    return unboxed.size()


def _once(size: int, processes: int) -> float:
    return size * (processes - 1) / processes


def _all(size: int, processes: int) -> float:
    return size


def _twice(size: int, processes: int) -> float:
    return 2 * _once(size, processes)


_COSTS: dict[str, Callable[[int, int], float]] = {
    "allreduce_": _twice,
    "allreduce_coalesced_": _twice,
    "_allgather_base_": _once,
    "allgather_": _once,
    "allgather_into_tensor_coalesced_": _once,
    "_reduce_scatter_base_": _once,
    "reduce_scatter_": _once,
    "alltoall_base_": _once,
    "alltoall_": _once,
    "broadcast_": _once,
    "send": _all,
}
"""Bytes that one process sends, from those of the larger of its inputs and outputs and the number of processes."""
