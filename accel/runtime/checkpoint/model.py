"""Weights from a folder into a model, whole or divided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...interfaces import Place
from .contents import is_extra
from .fit import Differences, compare
from .parts import box_of, local_of
from .read import Parts

Load = Callable[[], None]


def plan_model(parts: Parts, places: Mapping[str, Place], model: nn.Module, strict: bool) -> tuple[Load, Differences]:
    """Asks for this process's parts; a function that takes them over, and what it will skip.

    Raises CheckpointError for the latter if strict.
    """
    own = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and not is_extra(name)
    }
    first: dict[int, str] = {}
    same = {name: first.setdefault(id(value), name) for name, value in own.items()}
    shapes = {name: value.shape for name, value in own.items()}
    differences = compare(shapes, {n: p for n, p in places.items() if not is_extra(n)}, same)
    if differences and strict:
        kind = type(model).__name__
        raise CheckpointError(
            f"{parts.folder}: does not fit this {kind}: {differences.describe()}; {differences.advice()}"
        )
    wanted = {
        id(own[name]): name
        for name in reversed(own)
        if name in places and tuple(shapes[name]) == places[name].entry.shape and not own[name].is_meta
    }

    local = {name: local_of(own[name]) for name in wanted.values()}
    read = {name: parts.part(places[name], box_of(name, own[name]), local[name]) for name in local}

    def load() -> None:
        with torch.no_grad():
            for name in list(read):
                part = read.pop(name)
                if part is not local[name]:
                    local[name].copy_(part)

    return load, differences


def load_extra(model: nn.Module, extra: Mapping[str, Any]) -> None:
    """Hand each module what its `get_extra_state` returned."""
    for name, value in extra.items():
        if is_extra(name):
            model.get_submodule(name.rpartition(".")[0]).set_extra_state(value)
