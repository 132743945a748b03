"""Whether an optimizer treats every number by itself, found out by letting copies of it step samples.

One copy steps small matrices whole, two others step their upper and their lower rows. An optimizer that looks at more
than one number at a time (norms of parameters, products of matrices, a threshold over all) leaves other rows behind
when it sees only some of them. Nothing of this shows from outside, and a process that steps with the norm of its own
part goes on without an error.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from .adopt import PART, own_class
from .shards import whole_tensor

_LARGEST = 160
"""Elements of a sample along each dim at most: optimizers that factor matrices leave those below 128 as they are."""

_STEPS = 3

_CUT = 3
"""The first copy's samples have one row in so many."""

_LEARNING_RATE = 1e-2
"""Instead of the optimizer's own, which may be 0 where it has yet to warm up."""

_TOLERANCE = 1e-3
"""Of the largest change: far above what rounding does, far below a norm of other rows."""

Cut = Callable[[Tensor], Tensor]


def objection(optimizer: Optimizer, parts: bool) -> str | None:
    """Why this optimizer must not step parts of parameters, or not whole ones; None if a trial finds nothing.

    It is the same on all ranks, and neither the optimizer nor a random generator of torch's is changed.
    """
    cuts = (_all, _upper, _lower) if parts else (_all, _all)
    tried = _try(optimizer, [functools.partial(_changes, optimizer, cut) for cut in cuts])
    if isinstance(tried, str):
        return tried
    whole, *others = tried
    if not any(bool(change.any()) for change in whole):
        return "it changes none of the parameters in its groups"
    if parts and any(_differ(change, _join(*cut)) for change, *cut in zip(whole, *others, strict=True)):
        return "what it does to some rows of a parameter depends on the others, or on chance"
    if not parts and any(_differ(*changes) for changes in zip(*tried, strict=True)):
        return "what it does to a parameter depends on chance, which would differ where processes hold the same"
    return None


def objection_apart(optimizer: Optimizer) -> str | None:
    """Why this optimizer must not step where only some of its parameters have gradients; None as above."""
    tried = _try(optimizer, [functools.partial(_changes, optimizer, _all, 2, used) for used in (2, 1)])
    if isinstance(tried, str):
        return tried
    if any(_differ(*changes) for changes in zip(*tried, strict=True)):
        return "what it does to a parameter depends on others, or on chance"
    return None


def objection_divided(optimizer: Optimizer, mesh: DeviceMesh) -> str | None:
    """Why this optimizer must not step DTensors over this mesh; None as above. All processes of the mesh call it.

    Torch puts together what an optimizer looks at of other parts, but not all that optimizers do with parameters.
    """
    cuts = (_all, functools.partial(_divided, mesh, 0), functools.partial(_divided, mesh, -1))
    tried = _try(optimizer, [functools.partial(_changes, optimizer, cut) for cut in cuts])
    if isinstance(tried, str):
        return tried
    if any(_differ(whole, whole_tensor(part)) for whole, *parts in zip(*tried, strict=True) for part in parts):
        return "it does something else to a divided parameter than to a whole one"
    return None


def _divided(mesh: DeviceMesh, dim: int, tensor: Tensor) -> Tensor:
    """A tensor that all processes have, divided among them along a dim; a single number stays whole."""
    placement = Shard(dim % tensor.dim()) if tensor.dim() else Replicate()
    return distribute_tensor(tensor, mesh, [placement], src_data_rank=None)


def _try(optimizer: Optimizer, trials: Sequence[Callable[[], list[Tensor]]]) -> list[list[Tensor]] | str:
    """What each trial changes, or why one failed."""
    devices = {p.device.index for group in optimizer.param_groups for p in group["params"] if p.is_cuda}
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            return [trial() for trial in trials]
    except Exception as error:  # noqa: BLE001 - whatever somebody else's code raises is told
        return f"it could not be tried on samples ({type(error).__name__}: {error})"


def _changes(optimizer: Optimizer, cut: Cut, copies: int = 1, used: int = 1) -> list[Tensor]:
    """What some steps of a copy change in each of its samples, of which it has the rows that `cut` leaves.

    Of `copies` samples of a kind the first `used` have gradients. The changes are those of the first.
    """
    generator = torch.Generator().manual_seed(0)
    placed = _placed(optimizer, copies)
    wholes = _samples(placed, generator)
    kept = {key: nn.Parameter(cut(whole).clone()) for key, whole in wholes.items()}
    twin = _twin(optimizer, {id(p): kept[key] for key, p in placed})
    before = [sample.detach().clone() for sample in kept.values()]
    for _ in range(_STEPS):
        for key, whole in wholes.items():
            gradient = cut(_gradient(whole, generator)).clone()
            kept[key].grad = gradient if key.copy < used else None
        own_class(optimizer).step(twin)
    changes = zip(kept.items(), before, strict=True)
    return [sample.detach() - start for (key, sample), start in changes if not key.copy]


def _twin(optimizer: Optimizer, samples: dict[int, Any]) -> Optimizer:
    """The optimizer as it was before its first step, with samples in the place of its parameters."""
    hidden = ("_optimizer_", PART)
    left = {"state", "step", "zero_grad"}
    own = {k: v for k, v in optimizer.__dict__.items() if k not in left and not k.startswith(hidden)}
    own = copy.deepcopy(own, samples)
    twin: Optimizer = object.__new__(own_class(optimizer))
    twin.__setstate__({**own, "state": defaultdict(dict)})
    for group in twin.param_groups:
        group["params"] = list(dict.fromkeys(group["params"]))
        rate = group.get("lr")
        if rate is not None:
            group["lr"] = torch.full_like(rate, _LEARNING_RATE) if isinstance(rate, Tensor) else _LEARNING_RATE
    return twin


class _Key(NamedTuple):
    """Parameters that share a sample: those of a group that have the same number of dims, one in `copies`."""

    group: int
    dims: int
    copy: int


def _placed(optimizer: Optimizer, copies: int) -> list[tuple[_Key, Tensor]]:
    """Each parameter with the key of its sample."""
    counts = Counter[int]()
    placed = []
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            dims = parameter.dim()
            placed.append((_Key(index, dims, counts[dims] % copies), parameter))
            counts[dims] += 1
    return placed


def _samples(placed: list[tuple[_Key, Tensor]], generator: torch.Generator) -> dict[_Key, Tensor]:
    """One for each key, as large as its parameters are or as allowed."""
    largest: dict[_Key, list[int]] = {}
    devices = {}
    for key, parameter in placed:
        known = largest.setdefault(key, [2] * parameter.dim())
        largest[key] = [max(k, min(size, _LARGEST)) for k, size in zip(known, parameter.shape, strict=True)]
        devices[key] = parameter.device
    return {key: torch.randn(shape, generator=generator).to(devices[key]) for key, shape in largest.items()}


def _gradient(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random, and larger from row to row, so that rows do not look alike."""
    gradient = torch.randn(like.shape, generator=generator)
    if like.dim():
        gradient.mul_(torch.linspace(0.5, 2, len(like)).view(-1, *[1] * (like.dim() - 1)))
    return gradient.to(like)


def _all(tensor: Tensor) -> Tensor:
    return tensor


def _upper(tensor: Tensor) -> Tensor:
    return tensor[: math.ceil(len(tensor) / _CUT)] if tensor.dim() else tensor


def _lower(tensor: Tensor) -> Tensor:
    return tensor[math.ceil(len(tensor) / _CUT) :] if tensor.dim() else tensor


def _join(upper: Tensor, lower: Tensor) -> Tensor:
    return torch.cat([upper, lower]) if upper.dim() else torch.stack([upper, lower])


def _differ(one: Tensor, other: Tensor) -> bool:
    error = (other - one).abs().max()
    return not bool(error <= _TOLERANCE * one.abs().max())
