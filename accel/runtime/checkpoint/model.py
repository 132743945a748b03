"""Weights from a folder into a model, whole or divided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...interfaces import Place
from ...storage import Reader
from .contents import is_extra
from .fit import Differences, compare
from .read import read_into

Load = Callable[[], None]


def plan_model(folder: Path, places: Mapping[str, Place], model: nn.Module, strict: bool) -> tuple[Load, Differences]:
    """A function that loads this process's parts, and what it will skip. Raises CheckpointError if strict."""
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
        raise CheckpointError(
            f"{folder}: does not fit this {type(model).__name__}: {differences.describe()}; {differences.advice()}"
        )
    wanted = {
        id(own[name]): name
        for name in reversed(own)
        if name in places and tuple(shapes[name]) == places[name].entry.shape and not own[name].is_meta
    }

    def load() -> None:
        with torch.no_grad(), Reader(folder) as reader:
            for name in wanted.values():
                read_into(reader, places[name], own[name])

    return load, differences


def load_extra(model: nn.Module, extra: Mapping[str, Any]) -> None:
    """Hand each module what its `get_extra_state` returned."""
    for name, value in extra.items():
        if is_extra(name):
            model.get_submodule(name.rpartition(".")[0]).set_extra_state(value)
