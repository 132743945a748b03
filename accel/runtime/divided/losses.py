"""Cross entropy on logits of which each process holds some classes: a few numbers per position are sent, no logits.

Megatron-LM (Shoeybi et al. 2019, section 3) does so: the loss is log sum exp(x) - x[target], and both terms are sums
over the classes of all processes.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .peers import Peers, Undividable
from .tensor import Call, Divided, part_of


def cross_entropy(call: Call) -> Any:
    """torch.nn.functional.cross_entropy for classes by index, with its weights, smoothing and reductions."""
    bound = inspect.signature(F.cross_entropy).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    logits, target = given["input"], given["target"]
    classes = 1 if logits.dim() > 1 else 0
    if len(call.divided()) > 1 or not isinstance(logits, Divided) or logits.division.dim != classes:
        raise Undividable("it meets cross_entropy")
    others = given["size_average"] is not None or given["reduce"] is not None
    if target.is_floating_point() or logits.division.outer > 1 or logits.division.length or others:
        raise Undividable("it meets cross_entropy in a rare form")
    peers = logits.division.peers
    part = part_of(logits).movedim(classes, -1)
    loss, counts = _loss(part, target, given["weight"], given["ignore_index"], given["label_smoothing"], peers)
    if given["reduction"] == "none":
        return loss.to(_result_dtype(part))
    total = loss.sum() if given["reduction"] == "sum" else loss.sum() / counts.sum()
    return total.to(_result_dtype(part))


def _loss(
    part: Tensor, target: Tensor, weight: Tensor | None, ignore: int, smoothing: float, peers: Peers
) -> tuple[Tensor, Tensor]:
    """The loss of each position, from this process's part of the classes [.., c]; and how much each counts."""
    width = part.shape[-1]
    counted = target != ignore
    target = _checked(target, counted, width * peers.parts)
    x = part.to(torch.promote_types(part.dtype, torch.float32))
    x = x - peers.largest(x.detach().amax(-1)).unsqueeze(-1)  # so that no exponential overflows
    place = target - peers.index * width
    here = (place >= 0) & (place < width)
    rows = x.reshape(-1, width)  # indexing keeps nothing for backward, `gather` would keep all of it
    at_target = rows[torch.arange(rows.shape[0], device=x.device), place.clamp(0, width - 1).flatten()].view_as(place)
    shares = [x.exp().sum(-1), torch.where(here, at_target, 0.0)]
    if smoothing:
        shares.append(x.sum(-1) if weight is None else (x * peers.own(weight, 0)).sum(-1))
    exponentials, at_target, *smooth = peers.add(torch.stack(shares))
    log_sum = exponentials.log()
    counts = counted.to(x.dtype) if weight is None else torch.where(counted, weight[target], 0.0)
    loss = (log_sum - at_target) * (1.0 if weight is None else weight[target])
    for over_classes in smooth:
        classes = width * peers.parts
        heavy = classes if weight is None else weight.sum()
        loss = (1 - smoothing) * loss + smoothing / classes * (heavy * log_sum - over_classes)
    return torch.where(counted, loss, 0.0), counts


def _checked(target: Tensor, counted: Tensor, classes: int) -> Tensor:
    """Classes with 0 in place of those that do not count. Raises IndexError for one that is none."""
    target = torch.where(counted, target, 0)
    if target.device.type == "cpu":
        wrong = target[(target < 0) | (target >= classes)]
        if wrong.numel():
            raise IndexError(f"Target {int(wrong[0])} is out of bounds.")
    else:  # without waiting for the device
        torch._assert_async(((target >= 0) & (target < classes)).all())
    return target


def _result_dtype(part: Tensor) -> torch.dtype:
    """As torch has it: under autocast, losses are of float32."""
    return torch.float32 if torch.is_autocast_enabled(part.device.type) else part.dtype
