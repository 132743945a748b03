"""Optimizers that treat every number by itself see this process's parts of parameters as plain tensors.

DTensor decides anew for each operation how to distribute it, which for small parameters takes longer than the
operation itself. Where numbers do not meet (no norms of whole parameters, no products of matrices) it always finds that
each process works on its own part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .adopt import own_class
from .shards import held_part, like_part

_KNOWN = {
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
}
"""Classes whose step is known to treat every number by itself; not their subclasses, which may not."""


@contextmanager
def on_parts(optimizer: Optimizer) -> Iterator[None]:
    """Let one step of an optimizer find plain tensors in place of divided parameters.

    Where somebody else watches its steps, or numbers may meet, it finds what it always does.
    """
    places = _divided(optimizer)
    if not places or own_class(optimizer) not in _KNOWN or _is_watched(optimizer):
        yield
        return
    lent = [_Lent(optimizer, parameters, place) for parameters, place in places]
    try:
        yield
    finally:
        for part in lent:
            part.give_back()


def _is_watched(optimizer: Optimizer) -> bool:
    """Whether somebody is called at each step, who would see the parts."""
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)


def _divided(optimizer: Optimizer) -> list[tuple[list[Any], int]]:
    """Where the parameters stand that this step trains, and of which this process holds a part."""
    return [
        (group["params"], place)
        for group in optimizer.param_groups
        for place, parameter in enumerate(group["params"])
        if isinstance(parameter, DTensor)
        and isinstance(parameter.grad, DTensor)
        and parameter.grad.placements == parameter.placements
    ]


class _Lent:
    """A parameter whose place its part has taken, with gradient and state."""

    def __init__(self, optimizer: Optimizer, parameters: list[Any], place: int) -> None:
        self.states, self.parameters, self.place = optimizer.state, parameters, place
        self.divided = parameters[place]
        self.part = nn.Parameter(held_part(self.divided))
        self.part.grad = held_part(self.divided.grad)
        self.kept: dict[str, Any] = self.states.pop(self.divided, {})
        self.held = {key: held_part(v) if isinstance(v, Tensor) else v for key, v in self.kept.items()}
        if self.held:
            self.states[self.part] = dict(self.held)
        parameters[place] = self.part

    def give_back(self) -> None:
        """Put the parameter back, with the state that the step has left."""
        self.parameters[self.place] = self.divided
        if self.part in self.states:
            left = self.states.pop(self.part)
            self.states[self.divided] = {key: self._divided_again(key, value) for key, value in left.items()}

    def _divided_again(self, key: str, value: Any) -> Any:
        if key in self.kept and self.held[key] is value:
            return self.kept[key]
        if not isinstance(value, Tensor) or not value.dim() or value.shape != self.part.shape:
            return value
        return like_part(value, self.divided)
