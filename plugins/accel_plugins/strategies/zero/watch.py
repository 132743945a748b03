"""Whether somebody has changed parameters behind the strategy's back: divided ones, or copies that are thrown away."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel.errors import PrepareError


class Watch:
    """What one group's parameters were when they were gathered.

    Gathered ones are copies: what forward changes in them, other than through gradients, is lost. Until the first
    step, when models set themselves up, their values are compared; then torch's count of changes, which misses those
    through `.data`.
    """

    def __init__(self, group: Any) -> None:
        self.group, self.compares = group, True
        self._divided: list[tuple[int, int]] = []
        self._gathered: list[int] = []
        self._parts: list[Tensor | None] = []
        self._gather, self.free = group._to_unsharded, group._to_sharded
        group._to_unsharded, group._to_sharded = self._to_unsharded, self._to_sharded

    @property
    def outdated(self) -> bool:
        """Whether the divided parameters have changed since they were gathered."""
        return bool(self.group.is_unsharded and self._divided != self._count_divided())

    def check(self) -> None:
        """Raise PrepareError for a gathered parameter that was changed."""
        if not self.group.is_unsharded:
            return
        compares = self.compares and not self.outdated
        for parameter, version, part in zip(self.group.fsdp_params, self._gathered, self._parts, strict=True):
            if parameter._unsharded_param._version != version or (compares and _differs(parameter, part)):
                raise PrepareError(
                    f"forward: parameter {parameter._param_fqn!r} was changed in place, where it is a copy that is "
                    "gathered for forward and then freed; change it outside of forward, or hold it in a buffer"
                )

    def _to_unsharded(self) -> None:
        self._gather()
        self._divided = self._count_divided()
        self._gathered = [parameter._unsharded_param._version for parameter in self.group.fsdp_params]
        self._parts = [p._sharded_param_data.clone() if self.compares else None for p in self.group.fsdp_params]

    def _to_sharded(self) -> None:
        self.check()
        self._parts = [None] * len(self._parts)
        self.free()

    def _count_divided(self) -> list[tuple[int, int]]:
        divided = [parameter.sharded_param for parameter in self.group.fsdp_params]
        return [(tensor._version, tensor._local_tensor._version) for tensor in divided]


def _differs(parameter: Any, held: Tensor | None) -> bool:
    """Whether this process's part of a gathered parameter is another than what was `held` before, if that is known."""
    outputs = parameter.all_gather_outputs
    if held is None or len(outputs) != 1:
        return False
    part: Tensor = outputs[0].view(parameter.mesh_info.shard_mesh_size, -1)[parameter.mesh_info.shard_mesh_rank]
    own = held.to(part.device, part.dtype)
    return bool(part.numel()) and not torch.equal(part.view(torch.uint8), own.view(torch.uint8))
