"""Saving and loading all that a run consists of; the bytes on disk are a checkpoint plugin's business."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import CheckpointError
from ..interfaces.checkpoint import Checkpoint
from ..interfaces.precision import Precision
from . import collectives
from .loader import PreparedLoader
from .model import whole_state_dict
from .pack import pack, unpack
from .random import load_generator_states
from .shards import divide_like
from .world import World


@dataclass(frozen=True)
class State:
    """Everything that a checkpoint keeps, in the order in which it was prepared."""

    models: Sequence[nn.Module]
    optimizers: Sequence[Optimizer]
    schedulers: Sequence[LRScheduler]
    loaders: Sequence[PreparedLoader]
    registered: Sequence[Any]
    precision: Precision
    device: torch.device
    positions: Callable[[], Sequence[Mapping[str, Any]]]
    """Where each loader is to go on, which amid an accumulation window is not where it is."""

    generators: Callable[[], Mapping[str, Any]]
    """The random generators that belong to these positions."""

    def others(self) -> dict[str, Sequence[Any]]:
        """What has `state_dict` and `load_state_dict` and needs no further care, by group."""
        return {"scheduler": self.schedulers, "loader": self.loaders, "registered": self.registered}


def save(folder: Path, state: State, format: Checkpoint, world: World, barrier: Callable[[], None]) -> None:
    """Write a checkpoint; all ranks. It appears whole or not at all, and replaces an older one of the same name."""
    tensors, values = _collect(state, world)
    aside = folder.with_name(f".{folder.name}.writing")
    if world.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        format.save(aside, tensors, values)
        _replace(folder, aside)
    barrier()


def load(folder: Path, state: State, format: Checkpoint, world: World) -> None:
    """Take over a checkpoint; all ranks. Raises CheckpointError before anything is changed if it does not match."""
    folder = _find(folder)
    tensors, values = format.load(folder)
    _check(folder, state, tensors, values)
    for index, model in enumerate(state.models):
        _load_model(model, tensors[f"model_{index}"], folder)
    for index, optimizer in enumerate(state.optimizers):
        optimizer.load_state_dict(unpack(values["optimizer"][index], tensors[f"optimizer_{index}"]))
    for group, objects in state.others().items():
        for index, value in enumerate(objects):
            value.load_state_dict(unpack(values[group][index], tensors[group]))
    state.precision.load_state_dict(values["precision"])
    if world.rank < len(values["random"]):
        load_generator_states(unpack(values["random"][world.rank], tensors["random"]), state.device)


def _collect(state: State, world: World) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """All tensors by group and name, and the plain values beside them; all ranks."""
    tensors: dict[str, dict[str, Tensor]] = {"random": {}, **{group: {} for group in state.others()}}
    values: dict[str, Any] = {"optimizer": [], "precision": state.precision.state_dict()}
    for index, model in enumerate(state.models):
        tensors[f"model_{index}"] = {n: t for n, t in whole_state_dict(model).items() if isinstance(t, Tensor)}
    for index, optimizer in enumerate(state.optimizers):
        tensors[f"optimizer_{index}"] = {}
        values["optimizer"].append(pack(optimizer.state_dict(), tensors[f"optimizer_{index}"]))
    for group, objects in state.others().items():
        states = state.positions() if group == "loader" else [value.state_dict() for value in objects]
        values[group] = [pack(value, tensors[group], f"{group}.{i}") for i, value in enumerate(states)]
    generators = collectives.gather_object(state.generators(), world.group())
    values["random"] = [pack(g, tensors["random"], f"rank_{rank}") for rank, g in enumerate(generators)]
    return tensors, values


def _replace(folder: Path, aside: Path) -> None:
    """Put a finished folder in its place. If killed in between, the older one is found under its second name."""
    older = _second_name(folder)
    if folder.exists():
        shutil.rmtree(older, ignore_errors=True)
        folder.rename(older)
    aside.rename(folder)
    handle = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    shutil.rmtree(older, ignore_errors=True)


def _second_name(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.older")


def _find(folder: Path) -> Path:
    for candidate in (folder, _second_name(folder)):
        if candidate.is_dir():
            return candidate
    raise CheckpointError(f"{folder}: no such checkpoint; save_state({str(folder)!r}) writes it")


def _check(folder: Path, state: State, tensors: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the checkpoint was made with as many objects of each kind."""
    saved = {"model": sum(name.startswith("model_") for name in tensors)}
    saved.update({group: len(values.get(group, ())) for group in ("optimizer", *state.others())})
    here = {"model": len(state.models), "optimizer": len(state.optimizers)}
    here.update({group: len(objects) for group, objects in state.others().items()})
    if saved != here:
        differences = ", ".join(f"{saved[k]} {k}s (here {here[k]})" for k in here if saved[k] != here[k])
        raise CheckpointError(f"{folder}: holds {differences}; prepare the same objects before load_state")


def _load_model(model: nn.Module, saved: Mapping[str, Tensor], folder: Path) -> None:
    """Copy whole tensors into a model, each process its part."""
    own = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    missing, unexpected = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    wrong = [
        f"{n}: {tuple(saved[n].shape)}, here {tuple(own[n].shape)}"
        for n in own.keys() & saved.keys()
        if own[n].shape != saved[n].shape
    ]
    if missing or unexpected or wrong:
        raise CheckpointError(
            f"{folder}: does not fit this {type(model).__name__}: missing {missing}, unexpected {unexpected}, "
            f"shapes {wrong}"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(divide_like(saved[name], tensor))
