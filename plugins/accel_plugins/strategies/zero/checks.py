"""What ZeRO cannot train right, refused by name before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from accel.errors import PrepareError

if TYPE_CHECKING:
    from .strategy import Zero

_NOT_SHARDABLE = {
    torch.optim.LBFGS: "it flattens all parameters and calls the model itself",
    torch.optim.Adafactor: "it keeps row and column sums of whole matrices",
    torch.optim.Rprop: "its step depends on comparisons that torch cannot make on parts of a parameter",
    torch.optim.SparseAdam: "it takes sparse gradients, which cannot be divided",
}


def check_model(model: nn.Module, strategy: Zero) -> None:
    """Raise PrepareError for a model that cannot be divided, naming the part of it that is at fault."""
    for reason in (*_module_faults(model), *_parameter_faults(model, strategy), *_method_faults(model, strategy)):
        raise PrepareError(f"prepare: {strategy.name} cannot train this {type(model).__name__}: {reason}")


def check_optimizer(optimizer: Optimizer, strategy: Zero) -> None:
    """Raise PrepareError for an optimizer that cannot work on parts of parameters."""
    for kind, reason in _NOT_SHARDABLE.items():
        if isinstance(optimizer, kind):
            raise PrepareError(
                f"prepare: {strategy.name} cannot divide the optimizer {type(optimizer).__name__}: {reason}; "
                "use another, such as torch.optim.AdamW, or `strategies: ddp`"
            )


def _module_faults(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        place = repr(name) if name else "the model"
        if isinstance(module, FSDPModule):
            yield f"{place} was already divided by fully_shard; leave that to prepare()"
        if isinstance(module, DistributedDataParallel):
            yield f"{place} is wrapped in DistributedDataParallel; leave that to prepare()"
        if getattr(module, "sparse", False) is True and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield f"{place} makes sparse gradients, which cannot be divided; give it sparse=False"


def _method_faults(model: nn.Module, strategy: Zero) -> Iterator[str]:
    for name in strategy.options.methods:
        if not callable(getattr(model, name, None)):
            yield f"strategies.{strategy.name}.methods: it has no method {name!r}"


def _parameter_faults(model: nn.Module, strategy: Zero) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            yield f"parameter {name!r} has no shape yet; run one batch through the model before prepare()"
            return
        if id(parameter) in strategy.known:
            yield f"parameter {name!r} belongs to another prepared model too; prepare one model that holds both"
            return
        if isinstance(parameter, DTensor) and strategy.axis in (
            parameter.device_mesh.mesh_dim_names or (strategy.axis,)
        ):
            yield f"parameter {name!r} is already divided over {parameter.device_mesh}; leave that to prepare()"
    kinds: dict[torch.dtype, str] = {p.dtype: name for name, p in model.named_parameters() if p.requires_grad}
    if len(kinds) > 1:
        found = ", ".join(f"{name!r} is {str(dtype).removeprefix('torch.')}" for dtype, name in kinds.items())
        yield f"parameters that train must be of one type, but {found}; convert the model with .to(dtype)"
