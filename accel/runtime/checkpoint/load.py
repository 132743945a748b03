"""Taking over a checkpoint: verify all of it, compare it with what is prepared here, and only then change anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from ... import storage
from ...errors import CheckpointError
from ...interfaces import Checkpoint
from ...storage import Manifest, Range
from ..adopt import part_of
from ..optimizer import optimizer_part
from ..pack import unpack
from ..random import load_generator_states
from ..scheduler import SchedulerPart
from .contents import SMALL, State, group_of, parameter_names
from .exchange import Exchange
from .fit import Differences, check_counts, foreign
from .model import Load, load_extra, plan_model
from .optimizer import plan_optimizer
from .read import SavedTensors
from .write import VALUES

Skipped = dict[str, Differences]
"""What `strict=False` has left as it was, by group of tensors."""


def verify(folder: Path, exchange: Exchange, wanted: Callable[[Range], bool] | None = None) -> Manifest:
    """Read and check a checkpoint, each process a share; all ranks.

    Raises CheckpointError on all ranks if it is not complete, or naming the file and the tensor that are damaged.
    """
    manifest = exchange.from_main(lambda: storage.complete(folder))
    if wanted is not None:
        manifest = Manifest(manifest.sizes, [r for r in manifest.ranges if wanted(r)], manifest.facts)
    world = exchange.world
    found = exchange.together(lambda: list(islice(manifest.problems(folder, world.rank, world.size), 1)))
    if problems := [problem for some in found for problem in some]:
        raise CheckpointError(f"{folder / str(problems[0])}; load another checkpoint")
    return manifest


def load(folder: Path, state: State, format: Checkpoint, exchange: Exchange, strict: bool) -> Skipped:
    """Take over a checkpoint that has been verified; all ranks. Nothing changes if it does not fit."""
    values = exchange.from_main(lambda: json.loads((folder / VALUES).read_bytes()))
    plans, skipped = exchange.each(lambda: _plan(folder, values, state, format, strict))
    exchange.each(lambda: _apply(folder, values, state, format, plans, exchange.world.rank))
    return skipped


def load_weights(folder: Path, model: nn.Module, format: Checkpoint, exchange: Exchange, strict: bool) -> Differences:
    """Take over the weights of a model from any folder that the format reads; all ranks."""
    plan, differences = plan_weights(folder, model, format, exchange, strict)
    exchange.each(plan)
    return differences


def plan_weights(
    folder: Path, model: nn.Module, format: Checkpoint, exchange: Exchange, strict: bool
) -> tuple[Load, Differences]:
    """A function that does so, and what it will leave as it is; all ranks. Raises CheckpointError if strict."""

    def read() -> tuple[Load, Differences]:
        try:
            return plan_model(folder, format.places(folder, "model"), model, strict)
        except CheckpointError as error:
            hint = foreign(folder)
            raise CheckpointError(f"{error}; {hint}") if hint else error from None

    return exchange.each(read)


def _plan(
    folder: Path, values: Mapping[str, Any], state: State, format: Checkpoint, strict: bool
) -> tuple[list[Callable[[], None]], Skipped]:
    """What is to be done for models and optimizers, and what will be skipped."""
    here = {"models": len(state.models), "optimizers": len(state.optimizers)}
    here |= {kind: len(objects) for kind, objects in state.others().items()}
    check_counts(folder, {kind: len(values[kind]) for kind in here}, here)
    small = SavedTensors(folder, format.places(folder, SMALL))
    plans = {}
    for index, model in enumerate(state.models):
        group = group_of("model", index)
        plans[group] = plan_model(folder, format.places(folder, group), model, strict)
    for index, optimizer in enumerate(state.optimizers):
        group, names = group_of("optimizer", index), parameter_names(optimizer, state.models)
        saved = {key: unpack(value, small) for key, value in values["optimizers"][index].items()}
        plans[group] = plan_optimizer(folder, format.places(folder, group), saved, optimizer, names, strict)
    skipped = {group: differences for group, (_, differences) in plans.items() if differences}
    return [plan for plan, _ in plans.values()], skipped


def _apply(
    folder: Path,
    values: Mapping[str, Any],
    state: State,
    format: Checkpoint,
    plans: list[Callable[[], None]],
    rank: int,
) -> None:
    small = SavedTensors(folder, format.places(folder, SMALL))
    for plan in plans:
        plan()
    for model, saved in zip(state.models, values["models"], strict=True):
        load_extra(model, unpack(saved["extra"], small))
    for kind, objects in state.others().items():
        for value, saved in zip(objects, values[kind], strict=True):
            value.load_state_dict(unpack(saved, small))
    _align_schedulers(state)
    state.precision.load_state_dict(unpack(values["precision"], small))
    if rank < len(values["random"]):
        load_generator_states(unpack(values["random"][rank], small), state.device)


def _align_schedulers(state: State) -> None:
    """Let prepared schedulers know how far their optimizers have come."""
    for scheduler in state.schedulers:
        part, optimizer = part_of(scheduler), optimizer_part(scheduler.optimizer)
        if isinstance(part, SchedulerPart) and optimizer is not None:
            part.calls, part.steps = optimizer.calls, optimizer.steps
