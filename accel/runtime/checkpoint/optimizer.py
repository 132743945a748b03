"""Optimizer state from a folder, matched by the names of parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ...errors import CheckpointError
from ...interfaces import Place
from ..optimizer import optimizer_part
from ..shards import STEP, Elsewhere, like_part
from .fit import Differences
from .parts import box_of, local_of
from .read import Parts

Take = Callable[[], Tensor]
"""Gives a tensor that was asked for, once it has been read."""


def plan_optimizer(
    parts: Parts,
    places: Mapping[str, Place],
    values: Mapping[str, Any],
    optimizer: Optimizer,
    names: list[str],
    reshaped: Collection[int],
    strict: bool,
) -> tuple[Callable[[], None], Differences]:
    """Asks for this process's parts; a function that takes them over, and what it will skip.

    Raises CheckpointError for the latter if strict. `values` are what `collect` kept of the optimizer, `names` those
    of its parameters here; the state of those with the ids `reshaped` is left out, as it would not fit them.
    """
    folder, saved = parts.folder, {name for group in values["groups"] for name in group["params"]}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    differences = Differences(
        missing=[name for name in names if name not in saved],
        unexpected=sorted(saved - set(names)),
        shapes=[name for name, parameter in zip(names, parameters, strict=True) if id(parameter) in reshaped],
    )
    kind = type(optimizer).__name__
    if values["class"] != kind:
        if not strict:
            return lambda: None, Differences(kinds=[f"{values['class']}, here {kind}"])
        raise CheckpointError(
            f"{folder}: holds the state of {values['class']}, here is {kind}; prepare the same optimizer"
        )
    if differences and strict:
        raise CheckpointError(
            f"{folder}: does not fit this {kind}: parameters {differences.describe()}; {differences.advice()}"
        )
    groups = _groups(folder, values["groups"], optimizer, names)
    fitting = {full: place for full, place in places.items() if full.rpartition(".")[0] not in differences.shapes}
    wanted = _wanted(parts, fitting, optimizer, names)

    def load() -> None:
        state = _state(wanted, values["state"], names)
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


def _wanted(
    parts: Parts, places: Mapping[str, Place], optimizer: Optimizer, names: list[str]
) -> dict[int, dict[str, Take]]:
    """What this process wants of the state, by the parameters' places and by key."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {name: i for i, name in enumerate(names) if not isinstance(parameters[i], Elsewhere)}
    wanted: dict[int, dict[str, Take]] = {i: {} for i in index.values()}
    for full, place in places.items():
        name, _, key = full.rpartition(".")
        if name in index:
            parameter = parameters[index[name]]
            wanted[index[name]][key] = _ask(parts, place, key, parameter, optimizer.state.get(parameter, {}).get(key))
    return wanted


def _ask(parts: Parts, place: Place, key: str, parameter: nn.Parameter, own: Any) -> Take:
    """Ask for a saved tensor: laid out as its parameter if it has the parameter's shape, else whole.

    `own` is what the optimizer has of this kind, whose memory is used again.
    """
    if key == STEP or tuple(parameter.shape) != place.entry.shape:
        whole = parts.whole(place)
        return lambda: whole
    local = local_of(own) if isinstance(own, Tensor) else None
    part = parts.part(place, box_of(place.entry.name, parameter), local)
    return lambda: like_part(part.to(parameter.device), parameter)


def _state(wanted: Mapping[int, Mapping[str, Take]], rest: Mapping[str, Any], names: list[str]) -> dict[int, Any]:
    """The state by the parameters' places, of those that have any: plain values, and tensors now that they are read."""
    state = {i: {**rest.get(names[i], {}), **{key: take() for key, take in of.items()}} for i, of in wanted.items()}
    return {i: kept for i, kept in state.items() if kept}


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
