"""The GPU of Apple's processors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accel.interfaces import Device, Memory, Support

if TYPE_CHECKING:
    import torch


class MPS(Device):
    """The one GPU of an Apple machine."""

    type = "mps"
    collectives = "gloo"
    priority = 10

    @classmethod
    def count(cls) -> int:
        import torch

        return int(torch.backends.mps.is_available())

    def support(self, dtype: torch.dtype) -> Support:
        import torch

        return Support.NONE if dtype is torch.float64 else Support.NATIVE

    def memory(self) -> Memory:
        """Torch keeps no peak for this device: the driver's allocation stands in for it."""
        import torch

        return Memory(
            used=torch.mps.current_allocated_memory(),
            peak=torch.mps.driver_allocated_memory(),
            total=torch.mps.recommended_max_memory(),
        )

    def synchronize(self) -> None:
        import torch

        torch.mps.synchronize()
