"""Optimizer state from a folder, matched by the names of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ...errors import CheckpointError
from ...interfaces import Place
from ...storage import Reader
from ..optimizer import optimizer_part
from ..shards import Elsewhere, like_part
from .fit import Differences
from .parts import box_of
from .read import read_box, read_whole


def plan_optimizer(
    folder: Path,
    places: Mapping[str, Place],
    values: Mapping[str, Any],
    optimizer: Optimizer,
    names: list[str],
    strict: bool,
) -> tuple[Callable[[], None], Differences]:
    """A function that loads this process's parts, and what it will skip. Raises CheckpointError if strict.

    `values` are what `collect` kept of the optimizer, `names` those of its parameters here.
    """
    saved = {name for group in values["groups"] for name in group["params"]}
    differences = Differences(
        missing=[name for name in names if name not in saved], unexpected=sorted(saved - set(names))
    )
    kind = type(optimizer).__name__
    if values["class"] != kind and strict:
        raise CheckpointError(
            f"{folder}: holds the state of {values['class']}, here is {kind}; prepare the same optimizer"
        )
    if differences and strict:
        raise CheckpointError(
            f"{folder}: does not fit this {kind}: parameters {differences.describe()}; {differences.advice()}"
        )
    groups = _groups(folder, values["groups"], optimizer, names)

    def load() -> None:
        with Reader(folder) as reader:
            state = _state(reader, places, values["state"], optimizer, names)
        optimizer.load_state_dict({**values["others"], "state": state, "param_groups": groups})
        _undo_casts(optimizer, state)
        _set_steps(optimizer, values["steps"])

    return load, differences


def _groups(folder: Path, saved: list[dict[str, Any]], optimizer: Optimizer, names: list[str]) -> list[dict[str, Any]]:
    """The settings of each group here, from the saved group that holds its parameters."""
    of = {name: group for group in saved for name in group["params"]}
    groups, place = [], 0
    for group in optimizer.param_groups:
        count = len(group["params"])
        sources = [_settings(of[name]) for name in names[place : place + count] if name in of]
        if any(repr(source) != repr(sources[0]) for source in sources):
            raise CheckpointError(
                f"{folder}: parameters {names[place]}, ... are one group here, and were saved in groups with different "
                "settings; group them as they were"
            )
        settings = sources[0] if sources else _settings(group)
        groups.append({**settings, "params": list(range(place, place + count))})
        place += count
    return groups


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _state(
    reader: Reader,
    places: Mapping[str, Place],
    rest: Mapping[str, Mapping[Any, Any]],
    optimizer: Optimizer,
    names: list[str],
) -> dict[int, dict[Any, Any]]:
    """This process's parts of the state, by the parameters' places."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {name: place for place, name in enumerate(names) if not isinstance(parameters[place], Elsewhere)}
    state: dict[int, dict[Any, Any]] = {index[name]: dict(kept) for name, kept in rest.items() if name in index}
    for full, place in places.items():
        name, _, key = full.rpartition(".")
        if name in index:
            state.setdefault(index[name], {})[key] = _read(reader, place, parameters[index[name]])
    return state


def _read(reader: Reader, place: Place, parameter: nn.Parameter) -> Tensor:
    """A saved tensor: laid out as its parameter if it has the parameter's shape, else whole."""
    if not parameter.dim() or tuple(parameter.shape) != place.entry.shape:
        return read_whole(reader, place)
    local = read_box(reader, place, box_of(place.entry.name, parameter)).to(parameter.device)
    return like_part(local, parameter)


def _undo_casts(optimizer: Optimizer, state: Mapping[int, Mapping[Any, Any]]) -> None:
    """Put back what torch has cast to the parameter's dtype: state may be kept in a wider one."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, kept in state.items():
        own = optimizer.state[parameters[place]]
        for key, value in kept.items():
            if isinstance(value, Tensor) and own[key].dtype != value.dtype:
                own[key] = value.to(own[key].device)


def _set_steps(optimizer: Optimizer, steps: int) -> None:
    part = optimizer_part(optimizer)
    if part is not None:
        part.steps = steps
