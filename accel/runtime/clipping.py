"""The norm of gradients over all processes, however their parameters are divided.

A norm is the norm of the norms of its parts. So each process takes those of what it holds; they meet along every
axis of a mesh that divides a parameter, and then along the axes whose processes hold different parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad

from ..errors import PrepareError
from ..interfaces.strategy import Strategy
from .shards import held_part

_norm_here = clip_grad._get_total_norm


def placing(strategies: Sequence[Strategy]) -> list[Strategy]:
    """Those along whose axis processes hold different parameters."""
    return [strategy for strategy in strategies if strategy.places_parameters and strategy.mesh.size > 1]


@torch.no_grad()
def total_norm(parameters: Iterable[Tensor], norm_type: float, strategies: Sequence[Strategy]) -> Tensor:
    """The norm of these parameters' gradients over all processes, a plain scalar; all ranks.

    Each parameter counts once, however many processes hold it.
    """
    owned = [p for p in parameters if p.grad is not None and all(s.owns(p) for s in placing(strategies))]  # type: ignore[arg-type]
    norm = _norm_of_divided([parameter.grad for parameter in owned if parameter.grad is not None], norm_type)
    for strategy in placing(strategies):
        norm = _norm_along(norm.to(strategy.device), strategy.mesh.group, norm_type)
    return norm


def redirect_torch(strategies: Sequence[Strategy], models: Callable[[], Iterable[nn.Module]]) -> None:
    """Let torch's own `clip_grad_norm_` see all processes where each has the gradients of only some parameters.

    Without it each process would clip by a norm of its own and nobody would notice. It replaces the one function
    that all of torch's names for it call. `models` gives the prepared models at that moment.
    """

    def whole(tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: Any = None) -> Tensor:
        gradients = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        known = {id(p.grad): p for model in models() for p in model.parameters() if p.grad is not None}
        if any(id(gradient) not in known for gradient in gradients):
            return _norm_here(gradients, norm_type, error_if_nonfinite, foreach)
        norm = total_norm([known[id(gradient)] for gradient in gradients], norm_type, strategies)
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(f"clip_grad_norm_: the norm of the gradients over all processes is {norm.item()}")
        return norm

    if placing(strategies):
        clip_grad._get_total_norm = whole


def _norm_of_divided(gradients: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norm of gradients of which processes may hold parts, as DTensors do."""
    parts: dict[tuple[ProcessGroup, ...], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        parts[_dividing_groups(gradient)].append(held_part(gradient))
    norms = []
    for groups, tensors in parts.items():
        norm = _norm_here(tensors, norm_type)
        for group in groups:
            norm = _norm_along(norm, group, norm_type)
        norms.append(norm)
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros(())


def _norm_along(norm: Tensor, group: ProcessGroup, norm_type: float) -> Tensor:
    """The norm of one norm from each process of a group."""
    norms = [torch.empty_like(norm) for _ in range(group.size())]
    dist.all_gather(norms, norm, group=group)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return total


def _dividing_groups(gradient: Tensor) -> tuple[ProcessGroup, ...]:
    """The groups of processes that hold different parts of a gradient, innermost axis last."""
    if not isinstance(gradient, DTensor):
        return ()
    if any(placement.is_partial() for placement in gradient.placements):
        raise PrepareError(
            f"clip_grad_norm_: a gradient of shape {tuple(gradient.shape)} is a sum that is not complete "
            f"({gradient.placements}); clip after accelerator.backward(loss)"
        )
    mesh = gradient.device_mesh
    return tuple(
        mesh.get_group(dim) for dim, placement in enumerate(gradient.placements) if not placement.is_replicate()
    )
