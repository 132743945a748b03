"""A prepared learning-rate scheduler: the user's own object, which moves on only when its optimizer does."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from .adopt import PART, Adopted, Part, adopt
from .optimizer import optimizer_part


class SchedulerPart(Part):
    """Remembers how far the optimizer had come at the last call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.steps = 0

    def held_back(self, scheduler: LRScheduler) -> bool:
        """Whether the optimizer was called since the last time, but never stepped: mid-window, or overflowed.

        A scheduler that steps once an epoch thus moves on even if the epoch's last step overflowed.
        """
        optimizer = optimizer_part(scheduler.optimizer)
        if optimizer is None:
            return False
        called, stepped = optimizer.calls > self.calls, optimizer.steps > self.steps
        self.calls, self.steps = optimizer.calls, optimizer.steps
        return called and not stepped


class PreparedScheduler(Adopted):
    """Mixin of prepared schedulers."""

    def step(self, *args: Any, **kwargs: Any) -> None:
        part: SchedulerPart = self.__dict__["_accel"]
        if not part.held_back(self):  # type: ignore[arg-type]
            inner = part.shadowed.get("step") or super().step  # type: ignore[misc]
            inner(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        return {name: value for name, value in state.items() if name != PART}  # torch returns all attributes


def prepare_scheduler(scheduler: LRScheduler) -> LRScheduler:
    """Prepare a scheduler in place, once."""
    return adopt(scheduler, PreparedScheduler, SchedulerPart(), "step")
