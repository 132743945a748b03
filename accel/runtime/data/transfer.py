"""Moving batches to the device, whatever they are nested in."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..nested import map_tensors
from .share import Share

T = TypeVar("T")


class Movable(ABC):  # noqa: B024 - what it asks for is in __subclasshook__
    """Whatever has a `to` method and is no mapping: packed sequences, graphs, a user's own batch class."""

    @classmethod
    def __subclasshook__(cls, kind: type) -> bool:
        return callable(getattr(kind, "to", None)) and not issubclass(kind, Mapping)


def to_device(batch: T, device: torch.device) -> T:
    """The batch with every tensor on the device; containers keep their types, all else is the same object.

    Looks into dicts and other mappings, lists, tuples, named tuples and dataclasses; objects that have a `to`
    method of their own are moved by it.
    """
    result: T = map_tensors(lambda leaf: leaf.to(device), batch, Movable)
    return result


def moved(batches: Iterable[tuple[Share, T]], device: torch.device | None) -> Iterator[tuple[Share, T]]:
    """The batches on the device: on CUDA copied one batch ahead, on a stream of its own; none copied on CPU."""
    if device is None or device.type == "cpu":
        return iter(batches)
    if device.type == "cuda":
        return _ahead(batches, device)
    return ((share, to_device(batch, device)) for share, batch in batches)


def _ahead(batches: Iterable[tuple[Share, T]], device: torch.device) -> Iterator[tuple[Share, T]]:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ready: tuple[Share, T, torch.cuda.Event] | None = None
    for share, batch in batches:
        with torch.cuda.stream(stream):
            copied = map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch, Tensor)
            following = share, copied, stream.record_event()
        if ready is not None:
            yield _arrived(*ready, device)
        ready = following
    if ready is not None:
        yield _arrived(*ready, device)


def _arrived(share: Share, batch: T, copied: torch.cuda.Event, device: torch.device) -> tuple[Share, T]:
    """Let the stream that computes wait for the copy, and keep the memory until that stream is done with it."""
    computing = torch.cuda.current_stream(device)
    computing.wait_event(copied)

    def arrive(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf.to(device)
        leaf.record_stream(computing)
        return leaf

    return share, map_tensors(arrive, batch, Movable)
