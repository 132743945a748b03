"""A tensor of which each process holds a part, and which looks whole to the code that works with it.

A model's own code runs on it unchanged: shapes are those of the whole, and each operation for which there is a rule
(`rules`) works on the part alone, with a view's sizes, a mask or a scale made to fit. What has no rule gets the whole
tensor, put together from the parts: slower, and as right. So a layer is divided by dividing its weight, without a
word about the code around it.

Torch's DTensor does the same below autograd, at twenty times the cost per operation on a CPU, and has no rule for much
of what stands between the projections of an attention layer; here it holds parameters, not activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .peers import Peers, Undividable


@dataclass(frozen=True)
class Division:
    """How a tensor is divided: along `dim`, each of `outer` equal pieces of it into `peers.size` parts.

    `sources` are, while a model is observed, the layers that the values come from. `length` is that of the dim where
    the parts of it are not equal, as `operators.lengths_of` says; then `outer` is 1.
    """

    peers: Peers
    dim: int
    outer: int = 1
    sources: frozenset[Any] = field(default=frozenset(), compare=False)
    length: int | None = None


class Divided(Tensor):
    """This process's part of a tensor; to the code that works with it, the whole."""

    division: Division

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("a tensor that is divided among processes cannot be copied amid a forward pass")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from .composed import COMPOSED
        from .rules import rule_of

        call = Call(function, args, kwargs or {})
        with contextlib.suppress(Undividable):
            if call.name in COMPOSED:
                return COMPOSED[call.name](call)
        with torch._C.DisableTorchFunctionSubclass():
            if _looks_on(function):
                return call.run()
            try:
                return rule_of(call.name)(call)
            except Undividable as error:
                return _on_whole(call, error)


def _looks_on(function: Any) -> bool:
    """Whether this is a dispatch mode passing on an operation below autograd: one on the part already."""
    snapshot = torch._C.DispatchKey.PythonTLSSnapshot  # of all keys, modes alone exclude this one
    below = torch._C._dispatch_tls_is_dispatch_key_excluded(snapshot)
    return below and isinstance(function, torch._ops.OpOverload)


class Call:
    """One call of a torch function, by the name under which torch, Tensor and torch.nn.functional know it."""

    def __init__(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.name: str = function.__name__
        attribute = getattr(getattr(function, "__self__", None), "__name__", "")
        if self.name == "__get__":
            self.name = attribute
        elif self.name == "__set__" and attribute == "requires_grad":
            self.name = "requires_grad_"

    @property
    def first(self) -> Any:
        """The tensor that the call is about."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))

    def option(self, position: int, name: str, default: Any = None) -> Any:
        """An argument that may be given by its place or by its name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def run(self, convert: Callable[[Any], Any] = lambda value: value) -> Any:
        """Call the function itself, on its arguments or what `convert` makes of each."""
        args = [_map(convert, value) for value in self.args]
        return self.function(*args, **{name: _map(convert, value) for name, value in self.kwargs.items()})

    def divided(self) -> list[Divided]:
        """All divided tensors among the arguments."""
        found: list[Divided] = []
        for value in (*self.args, *self.kwargs.values()):
            _map(lambda item: found.append(item) if isinstance(item, Divided) else None, value)
        return found


def divide(part: Any, division: Division) -> Any:
    """Make this process's part stand for the whole."""
    if not isinstance(part, Tensor):
        return part
    result = part.as_subclass(Divided)
    result.division = division
    return result


def part_of(tensor: Divided) -> Tensor:
    """The plain tensor that this process holds."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def whole_of(tensor: Any) -> Any:
    """The whole, as a plain tensor on all processes; what is not divided stays. All processes of the axis call it."""
    if not isinstance(tensor, Divided):
        return tensor
    division = tensor.division
    return division.peers.gather(part_of(tensor), division.dim, division.outer, division.length)


def whole_shape(tensor: Tensor) -> list[int]:
    """The shape of the whole; called where torch functions are off, so that `shape` is the part's."""
    shape = list(tensor.shape)
    if isinstance(tensor, Divided):
        division = tensor.division
        shape[division.dim] = division.length or shape[division.dim] * division.peers.parts
    return shape


def moved(division: Division, dim: int, outer: int | None = None) -> Division:
    """The same division along another dim."""
    return replace(division, dim=dim, outer=division.outer if outer is None else outer)


def _on_whole(call: Call, error: Undividable) -> Any:
    """Do without a rule: put the tensors together first. What is only observed is whole, and may be changed too."""
    changes_first = (call.name.endswith("_") and not call.name.endswith("__")) or call.name in _CHANGES
    if changes_first and isinstance(call.first, Divided) and call.first.division.peers.parts > 1:
        peers = call.first.division.peers
        raise RuntimeError(
            f"{call.name}: cannot change a tensor in place that is divided over the {peers.axis} axis ({error}); "
            f"write it without changing in place, or {peers.remedy}"
        )
    for tensor in call.divided():
        if (hear := tensor.division.peers.divided_whole) and tensor.division.sources:
            hear(tensor.division.sources, error)
    return call.run(whole_of)


_CHANGES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__set__"}


def _map(convert: Callable[[Any], Any], value: Any) -> Any:
    """`convert` on a tensor, or on those in a list of them."""
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        return type(value)([_map(convert, item) for item in value])
    return value
