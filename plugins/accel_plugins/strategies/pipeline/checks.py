"""What cannot be trained right in stages, refused by name before the first step."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from torch.autograd.function import FunctionCtx
from torch.nn.parameter import is_lazy

from accel.errors import PrepareError
from accel.runtime.adopt import PART


def check_model(model: nn.Module, options: Any) -> None:
    """Raise PrepareError for a model that pipeline cannot train right, naming the part of it that is at fault."""
    for reason in _faults(model, options):
        raise PrepareError(f"prepare: pipeline cannot train this {type(model).__name__}: {reason}")


def runs_once(options: Any) -> bool:
    """Whether each part of a model runs once for a batch."""
    return bool(options.micro_batches == 1 and options.schedule != "1f1b")


def _faults(model: nn.Module, options: Any) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            yield f"parameter {name!r} has no shape yet; run one batch through the model before prepare()"
    for name, module in model.named_modules():
        if module is model and module._compiled_call_impl is not None:
            yield "the model is compiled, but runs on several stages; compile blocks instead, by block.compile()"
        if isinstance(module, OptimizedModule):
            yield (
                f"{name or 'the model'!r} is what torch.compile made of a module; compile blocks in place, by "
                "block.compile()"
            )
        if name and PART in module.__dict__:
            yield f"{name!r} was prepared on its own; prepare the whole model only"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not runs_once(options):
            yield (
                f"{name!r} computes statistics over the batch, and would over each micro-batch; set micro_batches: 1 "
                "with schedule: gpipe, or use a norm over each sample (GroupNorm, LayerNorm)"
            )


def check_compiled(model: nn.Module, parts: Iterable[nn.Module]) -> None:
    """Raise PrepareError for a compiled module that is on several stages, as it is not computed in one go."""
    inside = {id(module) for part in parts for module in part.modules()}
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None and id(module) not in inside:
            raise PrepareError(
                f"prepare: pipeline cannot train this {type(model).__name__}: {name!r} is compiled, but "
                "runs on several stages; compile blocks instead, by block.compile()"
            )


def refuse_autograd_functions(part: str, outermost: CodeType) -> None:
    """Raise PrepareError if the user's forward calls a part from within an autograd function.

    Gradients then flow by that function, not by what the part returned, and never reach an earlier stage.
    `outermost` is the code of the function that called the user's forward.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not outermost:
        name = next(iter(frame.f_code.co_varnames), None)
        if name is not None and isinstance(frame.f_locals.get(name), FunctionCtx):
            raise PrepareError(
                f"pipeline: {part} is called within an autograd function of which gradients do not come to earlier "
                "stages; for torch.utils.checkpoint pass use_reentrant=False, or let the block call it inside"
            )
        frame = frame.f_back  # type: ignore[assignment]
