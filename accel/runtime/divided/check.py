"""The divided model against the whole one: outputs and gradients on the example."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ...errors import PrepareError
from ..deferred import hollow_whole
from ..example import Inputs, tried_out
from ..nested import map_tensors, tensors
from ..shards import held_parameters
from .projections import Projections
from .tensor import Divided, whole_of


def refuse_compiled(modules: Mapping[str, nn.Module], setting: str) -> None:
    """Raise PrepareError for a module, by name, that is compiled; `setting` is the strategy that divides the model."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:  # nothing is compiled where it was never imported
        return
    for name, module in modules.items():
        if module._compiled_call_impl is not None or isinstance(module, dynamo.OptimizedModule):
            raise PrepareError(
                f"{setting}: {name or 'the model'!r} is compiled, and torch.compile does not follow tensors that are "
                f"parts and look whole to a model's code; leave `compile` out, here and beside {setting}"
            )


@dataclass(frozen=True)
class Result:
    """What a model gives on the example: output tensors by path, and gradients by parameter.

    Of a gradient that is too large to be kept, it is a projection onto each dim; else the dim is None.
    """

    outputs: Mapping[str, Tensor]
    gradients: Mapping[tuple[str, int | None], Tensor]


def run(model: nn.Module, inputs: Inputs) -> Result:
    """Forward and backward in evaluation mode, from a sum over all outputs with fixed weights; leaves no gradients."""
    args, kwargs = inputs
    held = set(held_parameters(model))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and p in held}
    kept = {name: p.grad for name, p in parameters.items()}
    hollow = {name: p for name, p in parameters.items() if hollow_whole(p) is not None}
    with tried_out(model), torch.enable_grad(), warnings.catch_warnings(), Projections(hollow) as projections:
        warnings.simplefilter("ignore")
        model.eval()
        for parameter in parameters.values():
            parameter.grad = None
        try:
            found = tensors(map_tensors(whole_of, model(*args, **kwargs), Divided))
            outputs = {path: t for path, t in found if t.is_floating_point()}
            losses = [_weighted(tensor) for tensor in outputs.values() if tensor.requires_grad]
            if losses:
                torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            gradients: dict[tuple[str, int | None], Tensor] = {
                (name, None): p.grad for name, p in parameters.items() if p.grad is not None
            }
            gradients |= projections.found
        finally:
            for name, parameter in parameters.items():
                parameter.grad = kept[name]
    return Result({path: tensor.detach() for path, tensor in outputs.items()}, gradients)


def compare(found: Result, expected: Result) -> str:
    """The first output or parameter that differs beyond what the order of additions explains; empty if none does."""
    named, wanted = ({name for name, _ in result.gradients} for result in (found, expected))
    if found.outputs.keys() != expected.outputs.keys() or named != wanted:
        return f"other outputs or gradients: {sorted(named ^ wanted)[:3]}"
    for path, tensor in expected.outputs.items():
        if difference := _difference(found.outputs[path], tensor, 0.0):
            return f"output{path} by {difference:.1e}"
    largest = max((tensor.abs().max().item() for tensor in expected.gradients.values() if tensor.numel()), default=0.0)
    for (name, dim), tensor in found.gradients.items():
        if difference := _difference(tensor, expected.gradients[name, dim], 1e-3 * largest):
            return f"the gradient of {name} by {difference:.1e}"
    return ""


def _weighted(tensor: Tensor) -> Tensor:
    """A sum in which each element counts differently, so that no error cancels."""
    weights = torch.linspace(-1, 1, tensor.numel(), device=tensor.device).cos().mul_(3).sin()
    result: Tensor = (tensor.float().flatten() * weights).sum() / float(max(tensor.numel(), 1) ** 0.5)
    return result


def _difference(found: Tensor, expected: Tensor, floor: float) -> float:
    """How far apart, relative to the largest element; 0 if within the tolerance. Of a DTensor, its own part."""
    if found.shape != expected.shape:
        return float("inf")
    scale = max(expected.abs().max().item() if expected.numel() else 0.0, floor, 1e-30)
    if isinstance(found, DTensor):
        expected = distribute_tensor(expected, found.device_mesh, found.placements, src_data_rank=None).to_local()
        found = found.to_local()
    if not found.numel() or torch.equal(found, expected):
        return 0.0
    difference: Any = (found.float() - expected.float()).abs().max().item() / scale
    return 0.0 if difference <= torch.finfo(expected.dtype).eps ** 0.5 else float(difference)
