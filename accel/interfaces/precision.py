"""The interface of a precision: the numbers that forward, backward and the optimizer work with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Steppable(Protocol):
    """What a precision sees of an optimizer: `step()` runs the user's own optimizer, unconditionally."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameters and their settings, as torch keeps them."""

    def step(self, closure: Any = None) -> Any:
        """Update the parameters from their gradients."""

    def on_any_process(self, flag: Tensor) -> Tensor:
        """The largest value of a scalar on any process that holds other gradients; they all call it."""


class Precision:
    """Plain fp32; a plugin overrides what it changes."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """The settings of this precision, under its name in the config."""

    dtype: ClassVar[str] = "float32"
    """Name of the torch dtype that forward and backward compute in; the device is asked whether it supports it."""

    scales_loss: ClassVar[bool] = False
    """Whether losses are scaled, so that a bare `loss.backward()` cannot be right."""

    def __init__(self, options: Any, device: torch.device) -> None:
        self.options, self.device = options, device

    def convert(self, model: nn.Module) -> nn.Module:
        """Change a model's layers or parameters, in place, before any strategy sees it."""
        return model

    def forward(self) -> AbstractContextManager[Any]:
        """A context around every forward pass, and around `Accelerator.autocast`."""
        return nullcontext()

    def output(self, value: Any) -> Any:
        """What the user's loop gets for the output of a forward pass; any nesting of tensors."""
        return value

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to run backward from."""
        return loss

    def unscale(self, optimizer: Steppable) -> None:
        """Undo `scale` on the gradients; called at most once before each `step`."""

    def step(self, optimizer: Steppable, unscaled: bool, closure: Any = None) -> tuple[bool, Any]:
        """Step, unless the gradients overflowed on any rank.

        `unscaled` says whether `unscale` was called. Returns whether it stepped, and what the step returned.
        """
        return True, optimizer.step(closure)

    def update(self, outstanding: Sequence[Steppable]) -> None:
        """Called after each step: the moment at which a loss scale may change.

        `outstanding` are the other optimizers that hold gradients made with the scale as it was.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this precision: plain numbers by name."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
