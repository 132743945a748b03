"""float16 with loss scaling (Micikevicius et al. 2018, "Mixed Precision Training").

float16's smallest normal number is 6e-5, and gradients are often smaller. So the loss, and with it each gradient,
is multiplied by a scale before backward, and divided by it before the optimizer sees it. A scale that is too large
overflows: that step is skipped, and the scale backs off.

torch.amp.GradScaler serves one optimizer at a time: with several, its `update` between two steps changes the scale
under the second one's gradients. Here the gradients that other optimizers hold move with the scale. The check for
overflow and the division are the same fused torch operation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from accel.config import setting
from accel.errors import ConfigError, PrepareError
from accel.interfaces import Precision, Steppable

from .autocast import Autocast

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class FP16(Autocast):
    """float16 arithmetic by autocast with dynamic loss scaling; parameters and optimizer state stay float32."""

    dtype = "float16"
    scales_loss: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Options(Precision.Options):
        """The settings of `fp16`."""

        initial_scale: float = setting(65536.0, minimum=1)
        """The loss scale to begin with."""

        growth_factor: float = setting(2.0, minimum=1)
        """What the scale is multiplied by after `growth_interval` steps without overflow."""

        growth_interval: int = setting(2000, minimum=1)
        """Steps without overflow before the scale grows."""

        backoff_factor: float = setting(0.5, minimum=0)
        """What the scale is multiplied by when gradients overflow."""

        minimum_scale: float = setting(1.0, minimum=0)
        """The scale never falls below this."""

        hysteresis: int = setting(1, minimum=1)
        """Overflows before the scale backs off; each skips its step all the same."""

        dynamic: bool = True
        """Whether the scale changes at all."""

        def __post_init__(self) -> None:
            if self.backoff_factor >= 1:
                raise ConfigError(f"backoff_factor: must be below 1, got {self.backoff_factor:g}")

    def __init__(self, options: Any, device: torch.device) -> None:
        super().__init__(options, device)
        self.loss_scale: float = options.initial_scale
        self._applied = self.loss_scale
        self._clean_steps = 0
        self._patience: int = options.hysteresis
        self._overflowed: dict[int, Tensor] = {}

    def scale(self, loss: Tensor) -> Tensor:
        return loss.float() * self.loss_scale

    def unscale(self, optimizer: Steppable) -> None:
        import torch

        overflowed = torch.zeros((), device=self.device)
        for (device, _), gradients in _gradients_by_kind(optimizer).items():
            found, inverse = torch.zeros((), device=device), torch.full((), 1 / self.loss_scale, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, inverse)
            overflowed = torch.maximum(overflowed, found.to(self.device))
        self._overflowed[id(optimizer)] = optimizer.on_any_process(overflowed)

    def step(self, optimizer: Steppable, unscaled: bool, closure: Any = None) -> tuple[bool, Any]:
        if closure is not None:
            raise PrepareError(
                "optimizer.step(closure): cannot be used with fp16, which checks gradients for overflow before it "
                "steps; mixed_precision: bf16 can"
            )
        if not unscaled:
            self.unscale(optimizer)
        overflowed = bool(self._overflowed.pop(id(optimizer)).item())
        self._adapt(overflowed)
        return (False, None) if overflowed else (True, optimizer.step())

    def update(self, outstanding: Sequence[Steppable]) -> None:
        import torch

        ratio = self.loss_scale / self._applied
        self._applied = self.loss_scale
        if ratio != 1.0:
            for optimizer in outstanding:
                for gradients in _gradients_by_kind(optimizer).values():
                    torch._foreach_mul_(gradients, ratio)

    def state_dict(self) -> dict[str, Any]:
        return {"loss_scale": self.loss_scale, "clean_steps": self._clean_steps, "patience": self._patience}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loss_scale = self._applied = float(state["loss_scale"])
        self._clean_steps, self._patience = int(state["clean_steps"]), int(state["patience"])

    def _adapt(self, overflowed: bool) -> None:
        """Back off after an overflow, grow after a long time without one."""
        options = self.options
        self._clean_steps = 0 if overflowed else self._clean_steps + 1
        if not options.dynamic:
            return
        if overflowed:
            self._patience -= 1
            if self._patience <= 0:
                self.loss_scale = max(self.loss_scale * options.backoff_factor, options.minimum_scale)
                self._patience = options.hysteresis
        elif self._clean_steps % options.growth_interval == 0:
            self.loss_scale *= options.growth_factor
            self._patience = options.hysteresis


def _gradients_by_kind(optimizer: Steppable) -> dict[Any, list[Tensor]]:
    """What this process holds of the gradients, in lists that torch's foreach operations take: one device and dtype."""
    from accel.runtime.shards import held_part

    kinds: dict[Any, list[Tensor]] = defaultdict(list)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                gradient = held_part(parameter.grad)
                kinds[gradient.device, gradient.dtype].append(gradient)
    return kinds
