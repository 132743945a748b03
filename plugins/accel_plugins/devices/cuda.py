"""NVIDIA GPUs, and AMD's through torch's ROCm build."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accel.interfaces import Device, Memory, Support

if TYPE_CHECKING:
    import torch


class CUDA(Device):
    """One CUDA GPU for each process; they talk through NCCL, and through gloo for what lies on the CPU."""

    type = "cuda"
    collectives = "cpu:gloo,cuda:nccl"
    priority = 20

    @classmethod
    def count(cls) -> int:
        import torch

        return torch.cuda.device_count()

    def select(self, local_rank: int) -> torch.device:
        import torch

        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)

    def support(self, dtype: torch.dtype) -> Support:
        import torch

        if dtype is torch.bfloat16:
            return Support.NATIVE if torch.cuda.is_bf16_supported(including_emulation=False) else Support.EMULATED
        return Support.NATIVE

    def memory(self) -> Memory:
        import torch

        return Memory(
            used=torch.cuda.memory_allocated(),
            peak=torch.cuda.max_memory_allocated(),
            total=torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory,
        )

    def reset_peak(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()
