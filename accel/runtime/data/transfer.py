"""Moving batches to the device, whatever they are nested in."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def to_device(batch: T, device: torch.device) -> T:
    """The batch with every tensor on the device; containers keep their types, all else is the same object.

    Looks into dicts and other mappings, lists, tuples, named tuples, dataclasses, and whatever has a `to` method.
    """
    result: T = _map(batch, lambda leaf: leaf.to(device))
    return result


def moved(batches: Iterable[tuple[Any, T]], device: torch.device | None) -> Iterator[tuple[Any, T]]:
    """Items whose second part is moved to the device: on CUDA one item ahead, on a stream of its own."""
    if device is None or device.type == "cpu":
        return iter(batches)
    if device.type == "cuda":
        return _ahead(batches, device)
    return ((share, to_device(batch, device)) for share, batch in batches)


def _ahead(batches: Iterable[tuple[Any, T]], device: torch.device) -> Iterator[tuple[Any, T]]:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ready: tuple[Any, T, torch.cuda.Event] | None = None
    for share, batch in batches:
        with torch.cuda.stream(stream):
            copied = _map(batch, lambda leaf: leaf.to(device, non_blocking=True) if _is_tensor(leaf) else leaf)
            following = share, copied, stream.record_event()
        if ready is not None:
            yield _arrived(*ready, device)
        ready = following
    if ready is not None:
        yield _arrived(*ready, device)


def _arrived(share: Any, batch: T, copied: torch.cuda.Event, device: torch.device) -> tuple[Any, T]:
    """Let the stream that computes wait for the copy, and keep the memory until that stream is done with it."""
    computing = torch.cuda.current_stream(device)
    computing.wait_event(copied)

    def arrive(leaf: Any) -> Any:
        if not _is_tensor(leaf):
            return leaf.to(device)  # an object's own `to` allocates memory that only this stream may use
        leaf.record_stream(computing)
        return leaf

    return share, _map(batch, arrive)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """`value` with `function` applied to what can be moved."""
    if isinstance(value, Mapping):
        items = {key: _map(item, function) for key, item in value.items()}
        return _filled(value, items) if isinstance(value, MutableMapping) else type(value)(items)  # type: ignore[call-arg]
    if callable(getattr(value, "to", None)) and not isinstance(value, type):
        return function(value)
    if isinstance(value, tuple):
        elements = [_map(item, function) for item in value]
        return type(value)(*elements) if hasattr(value, "_fields") else type(value)(elements)
    if isinstance(value, list):
        clone: Any = copy.copy(value)
        clone[:] = [_map(item, function) for item in value]
        return clone
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        clone = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(clone, field.name, _map(getattr(value, field.name), function))
        return clone
    return value


def _filled(mapping: MutableMapping[Any, Any], items: dict[Any, Any]) -> MutableMapping[Any, Any]:
    """A copy, so that a subclass keeps what it has beside its items (a default factory, attributes)."""
    clone = copy.copy(mapping)
    clone.update(items)
    return clone
