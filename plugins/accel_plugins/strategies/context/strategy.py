"""Context parallelism: each process works on some positions of every sequence, in the ordinary loop.

Processes along the context axis see the same batch and hold the same weights. Activations are divided along the
sequence; only attention lets positions meet, by heads (Jacobs et al. 2023, "DeepSpeed-Ulysses") or in a ring (Liu et
al. 2023, "Ring Attention with Blockwise Transformers").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from accel.config import setting
from accel.config.example import parse_example
from accel.errors import ConfigError
from accel.interfaces import Axis, Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .model import SequenceModel


class Context(Strategy):
    """Divides sequences, and so activations, among processes that see the same batch."""

    axis = Axis.CONTEXT
    waits = True

    @dataclass(frozen=True, kw_only=True)
    class Options(Strategy.Options):
        """The settings of `context`."""

        attention: Literal["auto", "ulysses", "ring"] = "auto"
        """How positions meet: each process takes some heads, or keys and values go round in a ring.

        `auto` takes heads where they divide by `size`, else the ring."""

        dims: Mapping[str, int] = setting({})
        """The dim of positions of each input to divide, by argument (`input_ids: 1`); by default found out."""

        example: Mapping[str, str] = setting({})
        """Inputs on which the model runs, by argument (`tokens: "int64[2, 8] < 100"`); by default made up."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.models: dict[nn.Module, SequenceModel] = {}

    @classmethod
    def check(cls, options: Any, size: int) -> None:
        parse_example(options.example)
        for name, dim in options.dims.items():
            if not isinstance(dim, int) or dim < 0:
                raise ConfigError(f"dims.{name}: expected the number of a dim, from 0, got {dim!r}")

    def setup(self, model: nn.Module) -> None:
        from .model import SequenceModel

        if self.mesh.size > 1:
            self.models[model] = SequenceModel(model, self)

    def check_model(self, model: nn.Module) -> None:
        if model in self.models:
            self.models[model].check_compiled()

    def before_forward(self, model: nn.Module) -> None:
        if model in self.models:
            self.models[model].before_forward()

    def before_backward(self, model: nn.Module, loss: Tensor, exchange: bool) -> Tensor:
        if model in self.models:
            self.models[model].announced = True
        return loss

    def after_backward(self, model: nn.Module, exchange: bool) -> None:
        if model in self.models:
            self.models[model].announced = False
            if exchange:
                self.exchange(model)

    def exchange(self, model: nn.Module) -> None:
        if model in self.models:
            self.models[model].exchange()

    def settle(self, model: nn.Module) -> None:
        self.exchange(model)

    def describe(self, model: nn.Module) -> dict[str, str]:
        return self.models[model].describe() if model in self.models else {}

    def release(self) -> None:
        self.models.clear()
