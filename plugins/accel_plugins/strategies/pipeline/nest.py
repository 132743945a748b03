"""A nesting of values apart from the tensors in it: the former is sent as text, the latter as they are."""

from __future__ import annotations

import types
from typing import Any, NoReturn

import torch
from torch import Tensor

from accel.errors import PrepareError
from accel.runtime.nested import leaves, map_tensors

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, types.EllipsisType)


class Place:
    """Where a tensor was, by its place among the tensors of the nesting."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class Left:
    """A value that stayed on the stage that made it: it is no tensor, number or text. Any use of it is refused."""

    def __init__(self, kind: str) -> None:
        self.__dict__["kind"] = kind

    def _refuse(self, *unused: Any) -> NoReturn:
        raise PrepareError(
            f"pipeline: a {self.__dict__['kind']} that the model returned is in parts on several stages, and cannot be "
            "used; a cache of keys and values is left out with use_cache=False, also in generate()"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying and pickling ask for
            raise AttributeError(name)
        self._refuse()

    __getitem__ = __len__ = __iter__ = __call__ = _refuse


def take_apart(value: Any) -> tuple[Any, list[Tensor]]:
    """A nesting with places instead of tensors, and the tensors in order."""
    found: list[Tensor] = []

    def place(tensor: Tensor) -> Place:
        found.append(tensor)
        return Place(len(found) - 1)

    skeleton = map_tensors(place, value)
    others = {type(leaf) for _, leaf in leaves(skeleton)} - {Place, *_PLAIN}
    others = {kind for kind in others if not issubclass(kind, _PLAIN)}
    if others:
        skeleton = map_tensors(lambda leaf: Left(type(leaf).__name__), skeleton, leaf=tuple(others))
    return skeleton, found


def put_together(skeleton: Any, tensors: list[Tensor]) -> Any:
    """The nesting with tensors in their places."""
    return map_tensors(lambda place: tensors[place.index], skeleton, leaf=Place)
