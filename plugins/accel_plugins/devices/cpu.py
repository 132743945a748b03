"""The CPU."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from accel.interfaces import Device, Memory, Support

if TYPE_CHECKING:
    import torch


class CPU(Device):
    """The CPU, shared by all processes of a machine; they talk through gloo."""

    type = "cpu"
    collectives = "gloo"
    shared = True

    @classmethod
    def count(cls) -> int:
        return os.cpu_count() or 1

    def support(self, dtype: torch.dtype) -> Support:
        """Half widths are native where oneDNN has instructions for them; fp16 without them is about 75 x slower."""
        import torch

        probes = {
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
        }
        if dtype not in probes:
            return Support.NATIVE
        return Support.NATIVE if torch.backends.mkldnn.enabled and probes[dtype]() else Support.EMULATED

    def memory(self) -> Memory:
        """Resident memory, from the kernel: torch keeps no count of CPU memory."""
        if sys.platform != "linux":
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            return Memory(used=peak, peak=peak, total=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        with open("/proc/self/status") as status:
            lines = dict(line.split(":", 1) for line in status)
        sizes = {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Memory(used=sizes["VmRSS"], peak=sizes["VmHWM"], total=total)

    def reset_peak(self) -> None:
        if sys.platform == "linux":
            with open("/proc/self/clear_refs", "w") as control:
                control.write("5")
