"""Taking over a checkpoint: compare it with what is prepared here, read and check it, and only then change anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ... import storage
from ...errors import CheckpointError, DamagedError
from ...interfaces import Checkpoint
from ...storage import Manifest, Range
from ..adopt import part_of
from ..optimizer import optimizer_part
from ..pack import unpack
from ..random import load_generator_states
from ..scheduler import SchedulerPart
from .contents import SMALL, State, group_of, parameter_names
from .exchange import Exchange
from .fit import Differences, check_counts, compare_kinds, complete, foreign, other_names
from .model import Load, load_extra, plan_model
from .optimizer import plan_optimizer
from .pickled import check_pickles
from .read import Parts, SavedTensors
from .write import VALUES

Skipped = dict[str, Differences]
"""What `strict=False` has left as it was, by group of tensors."""


def load(name: Path, state: State, format: Checkpoint, exchange: Exchange, strict: bool) -> tuple[Path, Skipped]:
    """Take over the checkpoint of this name; all ranks. Returns where it is, and what was skipped.

    Nothing changes if it is damaged or does not fit. Raises DamagedError, naming the file and the tensor if it can be
    told, or CheckpointError naming what differs.
    """

    def begin() -> tuple[Path, Manifest, Any]:
        folder = storage.find(name)
        manifest = _open(folder, lambda r: not r.tensor or r.file.startswith(SMALL))
        return folder, manifest, json.loads((folder / VALUES).read_bytes())

    folder, manifest, values = exchange.from_main(begin, DamagedError)
    parts = Parts(folder, [r for r in manifest.ranges if r.tensor and not r.file.startswith(SMALL)])
    plans, skipped = parts.ask(lambda: _plan(parts, values, state, format, strict), exchange)
    parts.fill(exchange)

    def take_over() -> None:
        parts.replace()
        _apply(folder, values, state, format, plans, skipped, exchange.world.rank)

    exchange.each(take_over)
    return folder, skipped


def load_weights(folder: Path, model: nn.Module, format: Checkpoint, exchange: Exchange, strict: bool) -> Differences:
    """Take over the weights of a model from any folder that the format reads; all ranks. Errors as in `load`."""

    def begin() -> list[Range]:
        if not (folder / storage.MANIFEST).exists():
            return []
        manifest = _open(folder, lambda r: not r.tensor and r.file.startswith("model"))
        return [r for r in manifest.ranges if r.tensor and r.file.startswith("model")]

    parts = Parts(folder, exchange.from_main(begin, DamagedError))
    plan, differences = plan_weights(parts, model, format, exchange, strict)
    parts.fill(exchange)

    def take_over() -> None:
        parts.replace()
        plan()

    exchange.each(take_over)
    return differences


def plan_weights(
    parts: Parts, model: nn.Module, format: Checkpoint, exchange: Exchange, strict: bool
) -> tuple[Load, Differences]:
    """A function that takes over the parts once they are read, and what it will leave as it is; all ranks.

    Raises CheckpointError for the latter if strict.
    """
    folder = parts.folder

    def ask() -> tuple[Load, Differences]:
        try:
            return plan_model(parts, format.places(folder, "model"), model, strict)
        except CheckpointError as error:
            hint = foreign(folder) or other_names(folder)
            raise CheckpointError(f"{error}; {hint}") if hint else error from None

    return parts.ask(ask, exchange)


def _open(folder: Path, first: Callable[[Range], bool]) -> Manifest:
    """The manifest of a complete checkpoint, of which those ranges have been checked that say where the others are.

    Rank 0 only. Raises CheckpointError.
    """
    manifest = complete(folder)
    heads = Manifest(manifest.sizes, [r for r in manifest.ranges if first(r)])
    for problem in heads.problems(folder):
        raise CheckpointError(f"{folder / str(problem)}; load another checkpoint")
    return manifest


def _plan(
    parts: Parts, values: Mapping[str, Any], state: State, format: Checkpoint, strict: bool
) -> tuple[list[Callable[[], None]], Skipped]:
    """What is to be done for models and optimizers once the parts are read, and what will be skipped."""
    folder = parts.folder
    here = {"models": len(state.models), "optimizers": len(state.optimizers)}
    here |= {kind: len(objects) for kind, objects in state.others().items()}
    check_counts(folder, {kind: len(values[kind]) for kind in here}, here)
    check_pickles(values["registered"], list(state.registered))
    small = SavedTensors(folder, format.places(folder, SMALL))
    plans, reshaped = {}, set[int]()
    for index, model in enumerate(state.models):
        group = group_of("model", index)
        plans[group] = plan_model(parts, format.places(folder, group), model, strict)
        reshaped |= {id(p) for name, p in model.named_parameters() if name in plans[group][1].reshaped}
    for index, optimizer in enumerate(state.optimizers):
        group, names = group_of("optimizer", index), parameter_names(optimizer, state.models)
        saved = {key: unpack(value, small) for key, value in values["optimizers"][index].items()}
        places = format.places(folder, group)
        plans[group] = plan_optimizer(parts, places, saved, optimizer, names, reshaped, strict)
    skipped = {group: differences for group, (_, differences) in plans.items() if differences}
    kinds = compare_kinds(folder, values["scheduler_classes"], [type(s).__name__ for s in state.schedulers], strict)
    skipped |= {group_of("scheduler", index): differences for index, differences in kinds.items()}
    return [plan for plan, _ in plans.values()], skipped


def _apply(
    folder: Path,
    values: Mapping[str, Any],
    state: State,
    format: Checkpoint,
    plans: list[Callable[[], None]],
    skipped: Skipped,
    rank: int,
) -> None:
    small = SavedTensors(folder, format.places(folder, SMALL))
    for plan in plans:
        plan()
    for model, saved in zip(state.models, values["models"], strict=True):
        load_extra(model, unpack(saved["extra"], small))
    for kind, objects in state.others().items():
        for index, (value, saved) in enumerate(zip(objects, values[kind], strict=True)):
            if group_of(kind.removesuffix("s"), index) not in skipped:
                value.load_state_dict(unpack(saved, small))
    _align_schedulers(state)
    if values["precision"]["class"] == type(state.precision).__name__:  # another's means nothing to this one
        state.precision.load_state_dict(unpack(values["precision"]["state"], small))
    if rank < len(values["random"]):
        load_generator_states(unpack(values["random"][rank], small), state.device)


def _align_schedulers(state: State) -> None:
    """Let prepared schedulers know how far their optimizers have come."""
    for scheduler in state.schedulers:
        part, optimizer = part_of(scheduler), optimizer_part(scheduler.optimizer)
        if isinstance(part, SchedulerPart) and optimizer is not None:
            part.calls, part.steps = optimizer.calls, optimizer.steps
