"""Optimizers that cannot step divided layers, refused by name before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim import Muon, Optimizer

from accel.errors import PrepareError
from accel.runtime.adopt import own_class
from accel.runtime.elementwise import never_divided, objection, objection_divided

if TYPE_CHECKING:
    from .strategy import Tensor


def check_optimizer(optimizer: Optimizer, strategy: Tensor) -> None:
    """Raise PrepareError for an optimizer whose steps would not be those of one process."""
    found = objection(optimizer, parts=False) if strategy.steps_whole else _objection(optimizer, strategy)
    if found is None:
        return
    whole = strategy.steps_whole or never_divided(optimizer)
    advice = "" if whole else "set strategies.tensor.step_on: whole, or "
    raise PrepareError(
        f"prepare: tensor cannot train with the optimizer {own_class(optimizer).__name__}: {found}; {advice}use "
        "another, such as torch.optim.AdamW"
    )


def _objection(optimizer: Optimizer, strategy: Tensor) -> str | None:
    if isinstance(optimizer, Muon):  # on small samples that would not show
        return "it adds up products of divided matrices in bfloat16, so that steps depend on the number of processes"
    return objection_divided(optimizer, strategy.mesh.device_mesh)
