"""What bf16 and fp16 share: float32 parameters, half-width arithmetic by torch.autocast, outputs in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from accel.interfaces import Precision


class Autocast(Precision):
    """Computes in `dtype` where that is safe, as torch.autocast decides operation by operation."""

    def forward(self) -> AbstractContextManager[Any]:
        import torch

        return torch.autocast(self.device.type, dtype=getattr(torch, self.dtype))

    def output(self, value: Any) -> Any:
        import torch

        from accel.runtime.nested import map_tensors

        half = (torch.float16, torch.bfloat16)
        return map_tensors(lambda tensor: tensor.float() if tensor.dtype in half else tensor, value)
