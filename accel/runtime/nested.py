"""Tensors inside nested containers: dicts, lists, tuples, named tuples and dataclasses, of any type."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor


def map_tensors(function: Callable[[Any], Any], value: Any, leaf: type | tuple[type, ...] = Tensor) -> Any:
    """The same nesting with `function` applied to each tensor, or `leaf`; other leaves are kept as they are.

    Containers keep their types. A container in which nothing changed is returned itself.
    """
    if isinstance(value, leaf):
        return function(value)
    if isinstance(value, Mapping):
        return _rebuild_mapping(value, {k: map_tensors(function, v, leaf) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        items = [map_tensors(function, v, leaf) for v in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _rebuild_dataclass(function, value, leaf)
    return value


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf of a nesting with its path, as in `[0].labels`."""
    if isinstance(value, Mapping):
        items = [(f"[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(f"[{index}]", item) for index, item in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        yield path, value
        return
    for step, item in items:
        yield from leaves(item, path + step)


def tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in a nesting with its path."""
    return ((path, leaf) for path, leaf in leaves(value) if isinstance(leaf, Tensor))


def _rebuild_mapping(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if all(items[key] is old for key, old in value.items()):
        return value
    if type(value) is dict:
        return items
    if isinstance(value, MutableMapping):  # a shallow copy keeps what the type knows besides its items
        result = copy.copy(value)
        for key, item in items.items():  # not `update`, which some types refuse
            result[key] = item
        return result
    return type(value)(items)  # type: ignore[call-arg]


def _rebuild_dataclass(function: Callable[[Any], Any], value: Any, leaf: type | tuple[type, ...]) -> Any:
    result = copy.copy(value)
    changed = False
    for field in dataclasses.fields(value):
        old = getattr(value, field.name)
        new = map_tensors(function, old, leaf)
        if new is not old:
            changed = True
            object.__setattr__(result, field.name, new)  # frozen dataclasses too: the copy is ours
    return result if changed else value
