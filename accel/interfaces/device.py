"""The interface of a device: the hardware that one process drives. Facts, no policy."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch


class Support(StrEnum):
    """How a device computes in a dtype."""

    NATIVE = "native"
    """At least as fast as in float32."""

    EMULATED = "emulated"
    """Right, but slower than float32."""

    NONE = "none"
    """Not at all."""


@dataclass(frozen=True)
class Memory:
    """Memory in bytes: what this process uses of the device now, its peak so far, and what the device has."""

    used: int
    peak: int
    total: int


class Device:
    """What accel needs to know of a kind of hardware; the rest is `torch.accelerator`."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """The settings of this device, under its name in the config."""

    type: ClassVar[str] = "cpu"
    """Torch's name for the device type."""

    collectives: ClassVar[str] = "gloo"
    """The torch.distributed backend for tensors on this device."""

    priority: ClassVar[int] = 0
    """Where no device is asked for, the available one with the highest priority is taken."""

    shared: ClassVar[bool] = False
    """Whether several processes may drive the same device, so that `count` is no limit."""

    @classmethod
    def count(cls) -> int:
        """Usable devices on this machine, 0 if none. Must not initialise the device: workers are forked later."""
        return 0

    def select(self, local_rank: int) -> torch.device:
        """Make this process drive its device, and return it."""
        import torch

        return torch.device(self.type)

    def support(self, dtype: torch.dtype) -> Support:
        """How this device computes in `dtype`."""
        return Support.NATIVE

    def memory(self) -> Memory:
        """This process's use of the device's memory."""
        return Memory(0, 0, 0)

    def reset_peak(self) -> None:
        """Let `memory().peak` count from now."""

    def synchronize(self) -> None:
        """Wait until the device has done all work given to it."""
