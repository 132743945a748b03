"""Tensor parallelism (Shoeybi et al. 2019, "Megatron-LM") for ordinary modules, in the ordinary loop.

Processes along the tensor axis see the same batch. Each holds some columns of the first matrix of a pair and the
matching rows of the second, and works on that part; one sum over the processes in forward, after the second, and one
in backward, before the first, make the numbers those of one process.
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
    from torch import nn
    from torch.optim import Optimizer

    from .engine import DividedModel

_STYLES = ("column", "row", "vocabulary", "replicate")


class Tensor(Strategy):
    """Divides the matrices of each layer among processes that see the same batch."""

    axis = Axis.TENSOR
    waits = True
    takes_empty = True

    @dataclass(frozen=True, kw_only=True)
    class Options(Strategy.Options):
        """The settings of `tensor`."""

        plan: Mapping[str, str] = setting({})
        """How layers are held, by name (`layers.*.q_proj: column`): column, row, vocabulary or replicate.

        What it leaves out follows a Hugging Face model's own plan, or is found by watching the model run."""

        sequence_parallel: bool = False
        """Divide activations between layers along the sequence: norms, dropout and shortcuts of some positions each."""

        loss_parallel: bool = False
        """Leave the logits of a divided vocabulary divided: cross entropy then exchanges a few numbers per position.

        Whatever else is done with logits that leave the model must then be done on all processes."""

        step_on: Literal["parts", "whole"] = "parts"
        """What an optimizer sees while it steps: divided parameters, or all of them gathered whole.

        `whole` takes their memory, and that of gradients and optimizer state, for the length of a step. It is for
        optimizers that do more with a parameter than divided ones allow, such as Muon and Adafactor."""

        example: Mapping[str, str] = setting({})
        """Inputs on which the model runs, by argument (`tokens: "int64[2, 8] < 100"`); by default made up."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.models: dict[nn.Module, DividedModel] = {}

    @classmethod
    def check(cls, options: Any, size: int) -> None:
        for pattern, style in options.plan.items():
            if style not in _STYLES:
                raise ConfigError(f"plan.{pattern}: expected one of {', '.join(_STYLES)}, got {style!r}")
        parse_example(options.example)

    def setup(self, model: nn.Module) -> None:
        from .engine import DividedModel

        if self.mesh.size > 1:
            self.models[model] = DividedModel(model, self)

    def check_model(self, model: nn.Module) -> None:
        if model in self.models:
            self.models[model].check_compiled()

    def check_optimizer(self, optimizer: Optimizer) -> None:
        if self.models:
            from .optimizers import check_optimizer

            check_optimizer(optimizer, self)

    @property
    def steps_whole(self) -> bool:
        return bool(self.options.step_on == "whole")

    def before_forward(self, model: nn.Module) -> None:
        if model in self.models:
            self.models[model].before_forward()

    def describe(self, model: nn.Module) -> dict[str, str]:
        return self.models[model].describe() if model in self.models else {}

    def owns(self, parameter: Any) -> bool:
        placements = getattr(parameter, "placements", ())
        return self.mesh.index == 0 or any(placement.is_shard() for placement in placements)

    def release(self) -> None:
        self.models.clear()
