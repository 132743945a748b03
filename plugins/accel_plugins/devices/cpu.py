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
        """bfloat16 is native where oneDNN has instructions for it.

        float16 is not: without AVX512-FP16 its products are about 75 times slower than float32's, and with it the
        backward pass of convolutions still is, for want of a kernel.
        """
        import torch

        if dtype is torch.bfloat16:
            native = torch.backends.mkldnn.enabled and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            return Support.NATIVE if native else Support.EMULATED
        return Support.EMULATED if dtype is torch.float16 else Support.NATIVE

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
