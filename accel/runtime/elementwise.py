"""Optimizers that treat every number by itself see this process's parts of parameters as plain tensors.

DTensor decides anew for each operation how to distribute it, which for small parameters takes longer than the
operation itself. Where numbers do not meet (no norms of whole parameters, no products of matrices) it always finds that
each process works on its own part.

Others may see whole tensors: every process then does the whole step, and keeps its parts of what that has made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import trial
from .adopt import own_class
from .shards import divide_like, held_part, like_part, whole_tensor

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
    torch.optim.Rprop,
    torch.optim.ASGD,
}
"""Classes whose step is known to treat every number by itself; not their subclasses, which may not."""


_NEVER = {
    torch.optim.LBFGS: "it flattens all parameters and calls the model itself",
    torch.optim.SparseAdam: "it takes sparse gradients, which cannot be divided",
}
"""Classes that step all parameters whole, in one process, or not at all."""


def objection(optimizer: Optimizer, parts: bool) -> str | None:
    """Why this optimizer must not step parts of parameters, or not whole ones; None if it may. Same on all ranks."""
    return _judged(optimizer, lambda: trial.objection(optimizer, parts))


def objection_apart(optimizer: Optimizer) -> str | None:
    """The same for an optimizer that steps some parameters where other processes step the others."""
    return _judged(optimizer, lambda: trial.objection_apart(optimizer))


def objection_divided(optimizer: Optimizer, mesh: DeviceMesh) -> str | None:
    """The same for one that finds DTensors, of which torch puts together what it looks at; all processes of a mesh."""
    return _judged(optimizer, lambda: trial.objection_divided(optimizer, mesh))


def never_divided(optimizer: Optimizer) -> str | None:
    """Why no process may step without all parameters whole; None if that depends."""
    return next((reason for kind, reason in _NEVER.items() if isinstance(optimizer, kind)), None)


def _judged(optimizer: Optimizer, tried: Callable[[], str | None]) -> str | None:
    """What is known of an optimizer's class, else what a trial finds."""
    return None if own_class(optimizer) in _KNOWN else never_divided(optimizer) or tried()


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


@contextmanager
def on_whole(optimizer: Optimizer, wholes: dict[Tensor, nn.Parameter]) -> Iterator[None]:
    """Let one step of an optimizer find whole plain tensors in place of divided parameters; all ranks.

    `wholes` has the stand-in for each parameter, which is the same object in each step: an optimizer may keep things
    for it elsewhere than in its state.
    """
    lent = [_LentWhole(optimizer, parameters, place, wholes) for parameters, place in _divided(optimizer)]
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
        self.plain = self._stand_in()
        self.plain.grad = self._see(self.divided.grad)
        self.kept: dict[str, Any] = self.states.pop(self.divided, {})
        self.seen = {key: self._see(v) if isinstance(v, Tensor) else v for key, v in self.kept.items()}
        if self.seen:
            self.states[self.plain] = dict(self.seen)
        parameters[place] = self.plain

    def give_back(self) -> None:
        """Put the parameter back, with the state that the step has left."""
        self.parameters[self.place] = self.divided
        if self.plain in self.states:
            left = self.states.pop(self.plain)
            self.states[self.divided] = {key: self._divided_again(key, value) for key, value in left.items()}

    def _stand_in(self) -> nn.Parameter:
        return nn.Parameter(held_part(self.divided))

    def _see(self, tensor: Tensor) -> Tensor:
        return held_part(tensor)

    def _divided_again(self, key: str, value: Any) -> Any:
        if key in self.kept and self.seen[key] is value:
            return self.kept[key]
        return like_part(value, self.divided) if self._is_like_parameter(value) else value

    def _is_like_parameter(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and value.shape == self.plain.shape


class _LentWhole(_Lent):
    """The same with whole tensors, of which this process keeps its parts."""

    def __init__(
        self, optimizer: Optimizer, parameters: list[Any], place: int, wholes: dict[Tensor, nn.Parameter]
    ) -> None:
        self.wholes = wholes
        super().__init__(optimizer, parameters, place)

    def give_back(self) -> None:
        held_part(self.divided).copy_(self._own_part(self.plain.detach()))
        super().give_back()
        self.plain.data, self.plain.grad = self.plain.data.new_empty(0), None

    def _stand_in(self) -> nn.Parameter:
        whole = self._see(self.divided)
        plain = self.wholes.setdefault(self.divided, nn.Parameter(whole))
        plain.data = whole
        return plain

    def _see(self, tensor: Tensor) -> Tensor:
        return whole_tensor(tensor.detach())

    def _divided_again(self, key: str, value: Any) -> Any:
        if not self._is_like_parameter(value):
            return value
        return like_part(self._own_part(value).clone(), self.divided)  # else all of it would stay in memory

    def _own_part(self, whole: Tensor) -> Tensor:
        return held_part(divide_like(whole, self.divided))
