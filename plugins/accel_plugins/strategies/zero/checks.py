"""What ZeRO cannot train right, refused by name before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from accel.errors import PrepareError
from accel.runtime.adopt import own_class
from accel.runtime.elementwise import never_divided, objection

if TYPE_CHECKING:
    from .strategy import Zero


def check_model(model: nn.Module, strategy: Zero) -> None:
    """Raise PrepareError for a model that cannot be divided, naming the part of it that is at fault."""
    faults = (_module_faults(model), _parameter_faults(model, strategy), _memory_faults(model))
    for reason in chain(*faults, _method_faults(model, strategy)):
        raise PrepareError(f"prepare: {strategy.name} cannot train this {type(model).__name__}: {reason}")


def check_optimizer(optimizer: Optimizer, strategy: Zero) -> None:
    """Raise PrepareError for an optimizer that cannot work on parts of parameters."""
    if never := never_divided(optimizer):
        raise _refusal(optimizer, strategy, f"{never}; ")
    if not any(model.exchange is not None for model in strategy.models.values()):
        return
    found = objection(optimizer, parts=not strategy.steps_whole)
    if found is not None:
        advice = "" if strategy.steps_whole else f"set strategies.{strategy.name}.step_on: whole, or "
        raise _refusal(optimizer, strategy, f"{found}; {advice}")


def _refusal(optimizer: Optimizer, strategy: Zero, reason: str) -> PrepareError:
    return PrepareError(
        f"prepare: {strategy.name} cannot divide the optimizer {own_class(optimizer).__name__}: {reason}"
        "use another, such as torch.optim.AdamW, or `strategies: ddp`"
    )


def _module_faults(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        place = repr(name) if name else "the model"
        if isinstance(module, FSDPModule):
            yield f"{place} was already divided by fully_shard; leave that to prepare()"
        if isinstance(module, torch.jit.ScriptModule):
            yield f"{place} is a torch.jit script, whose parameters cannot be divided; prepare what it was made from"
        if isinstance(module, DistributedDataParallel):
            yield f"{place} is wrapped in DistributedDataParallel; leave that to prepare()"
        if packed := [key for key, value in vars(module).items() if isinstance(value, torch.ScriptObject)]:
            yield f"{place} keeps packed weights ({packed[0]}), which cannot be sent to other processes; quantize later"
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            yield f"{place} has max_norm, which changes its weight in forward, where that is a copy; scale its output"
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
        if parameter.requires_grad and parameter.is_complex():
            yield f"parameter {name!r} is complex; hold its torch.view_as_real, of which torch.view_as_complex is it"
        steps = zip(parameter.shape, parameter.stride(), strict=True)
        if parameter.requires_grad and any(size > 1 and stride == 0 for size, stride in steps):
            yield f"parameter {name!r} is expanded: several of its elements are one in memory; make it of a .clone()"
    kinds: dict[torch.dtype, str] = {p.dtype: name for name, p in model.named_parameters() if p.requires_grad}
    if len(kinds) > 1:
        found = ", ".join(f"{name!r} is {str(dtype).removeprefix('torch.')}" for dtype, name in kinds.items())
        yield f"parameters that train must be of one type, but {found}; convert the model with .to(dtype)"


def _memory_faults(model: nn.Module) -> Iterator[str]:
    """Different tensors in the same memory: once divided, a change of one would not show in the other."""
    places: dict[Any, list[tuple[str, Tensor]]] = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if not tensor.is_meta and not isinstance(tensor, DTensor) and tensor.layout is torch.strided:
            place = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            places.setdefault(place, []).append((name, tensor))
    for beside in places.values():
        for (name, tensor), (other, same) in combinations(beside, 2):
            if (tensor.requires_grad or same.requires_grad) and _overlap(tensor, same):
                yield f"{name!r} and {other!r} are different tensors in the same memory; make them one, or copy one"


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether tensors in the same storage have elements in common, as far as their shapes tell."""
    if not one.numel() or not other.numel():
        return False
    if not one.is_contiguous() or not other.is_contiguous():
        return one.storage_offset() == other.storage_offset()
    start, first = (int(tensor.storage_offset()) * tensor.itemsize for tensor in (one, other))
    return start < first + other.nbytes and first < start + one.nbytes
