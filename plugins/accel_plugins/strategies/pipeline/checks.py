"""What cannot be trained right in stages, refused by name before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from accel.errors import PrepareError
from accel.runtime.adopt import PART


def check_model(model: nn.Module, options: Any) -> None:
    """Raise PrepareError for a model that pipeline cannot train right, naming the part of it that is at fault."""
    for reason in _faults(model, options):
        raise PrepareError(f"prepare: pipeline cannot train this {type(model).__name__}: {reason}")


def _faults(model: nn.Module, options: Any) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            yield f"parameter {name!r} has no shape yet; run one batch through the model before prepare()"
    for name, module in model.named_modules():
        if name and PART in module.__dict__:
            yield f"{name!r} was prepared on its own; prepare the whole model only"
        whole = options.micro_batches == 1 and options.schedule != "1f1b"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not whole:
            yield (
                f"{name!r} computes statistics over the batch, and would over each micro-batch; set micro_batches: 1 "
                "with schedule: gpipe, or use a norm over each sample (GroupNorm, LayerNorm)"
            )
