"""What a run consists of: tensors by group and name, and the plain values beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ...errors import CheckpointError
from ...interfaces import Precision
from ..loader import PreparedLoader
from ..optimizer import optimizer_part
from ..pack import pack
from ..shards import Elsewhere
from .ownership import Held
from .parts import box_of, entry_of

SMALL = "state"
"""The group of tensors that are no weights and no state of an optimizer; rank 0 writes them."""

EXTRA = "_extra_state"
"""How torch names what a module keeps besides tensors."""


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
    config: Mapping[str, Any]
    positions: Callable[[], Sequence[Mapping[str, Any]]]
    """Where each loader is to go on, which amid an accumulation window is not where it is."""

    generators: Callable[[], Mapping[str, Any]]
    """The random generators that belong to these positions."""

    def others(self) -> dict[str, Sequence[Any]]:
        """What has `state_dict` and `load_state_dict` and needs no further care, by kind."""
        return {"schedulers": self.schedulers, "loaders": self.loaders, "registered": self.registered}

    @property
    def step(self) -> int:
        """Optimizer steps of this run so far; with several optimizers, of the one that made the most."""
        return max((steps_of(optimizer) for optimizer in self.optimizers), default=0)


@dataclass
class Contents:
    """What this process knows of a checkpoint before it is written.

    `tensors` are those of models and optimizers, each perhaps a part, and whether all its holders hold the same.
    `small` are whole CPU tensors that `values` refer to.
    """

    tensors: dict[str, dict[str, tuple[Tensor, bool]]] = field(default_factory=dict)
    small: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    divided: bool = False
    """Whether optimizers here have parameters that only other processes hold."""

    def scattered(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """The plain state of optimizers, if it is only of the parameters held here, and the tensors it refers to."""
        if not self.divided:
            return [], {}
        states = [optimizer["state"] for optimizer in self.values["optimizers"]]
        prefixes = tuple(f"{group_of('optimizer', index)}.state." for index in range(len(states)))
        return states, {name: tensor for name, tensor in self.small.items() if name.startswith(prefixes)}

    def add_scattered(self, states: Sequence[Mapping[str, Any]], small: Mapping[str, Tensor]) -> None:
        """Take over another process's plain state of optimizers, for the parameters that it holds."""
        for optimizer, state in zip(self.values["optimizers"], states, strict=False):
            optimizer["state"] = {**state, **optimizer["state"]}
        self.small = {**small, **self.small}

    def table(self) -> list[Held]:
        """The parts that this process holds."""
        return [
            Held(group, entry_of(name, tensor), box_of(name, tensor), alike)
            for group, named in self.tensors.items()
            for name, (tensor, alike) in named.items()
        ]


def group_of(kind: str, index: int) -> str:
    """The name of a group of tensors: `model`, then `model_1`, ..."""
    return f"{kind}_{index}" if index else kind


def steps_of(optimizer: Optimizer) -> int:
    """How often a prepared optimizer has stepped."""
    part = optimizer_part(optimizer)
    return part.steps if part is not None else 0


def collect(state: State) -> Contents:
    """All that goes into a checkpoint but the random generators; all ranks."""
    contents = Contents()
    contents.values = {
        "step": state.step,
        "versions": {"accel": _version(), "torch": torch.__version__},
        "config": pack(dict(state.config), contents.small),
        "models": [collect_model(contents, i, model) for i, model in enumerate(state.models)],
        "optimizers": [_collect_optimizer(contents, i, o, state.models) for i, o in enumerate(state.optimizers)],
        "precision": {
            "class": type(state.precision).__name__,
            "state": pack(state.precision.state_dict(), contents.small, "precision"),
        },
    }
    for kind, objects in state.others().items():
        states = state.positions() if kind == "loaders" else [value.state_dict() for value in objects]
        packed = [_pack_of(objects[i], value, contents, f"{kind}.{i}") for i, value in enumerate(states)]
        contents.values[kind] = packed
    contents.values["scheduler_classes"] = [type(scheduler).__name__ for scheduler in state.schedulers]
    return contents


@cache
def _version() -> str:
    return version("accel-torch")


def _pack_of(owner: Any, state: Any, contents: Contents, path: str) -> Any:
    """The plain form of an object's state; an error says whose it is, and what would work."""
    try:
        return pack(state, contents.small, path)
    except CheckpointError as error:
        name = type(owner).__name__
        hint = f"register_for_checkpointing({name.lower()}, pickle=True) would keep a pickle of it"
        raise CheckpointError(
            f"{name}: {error}; {hint}" if path.startswith("registered") else f"{name}: {error}"
        ) from None


def collect_random(state: State, rank: int) -> tuple[Any, dict[str, Tensor]]:
    """This process's random generators as plain values and tensors."""
    tensors: dict[str, Tensor] = {}
    return pack(dict(state.generators()), tensors, f"random.rank_{rank}"), tensors


def collect_model(contents: Contents, index: int, model: nn.Module) -> dict[str, Any]:
    """Add a model's tensors to the contents; returns the plain values.

    A buffer is that of the first rank that has it, as it may differ; what is on the meta device, others have.
    """
    state = model.state_dict(keep_vars=True)
    contents.tensors[group_of("model", index)] = {
        name: (value.detach(), isinstance(value, nn.Parameter))
        for name, value in state.items()
        if isinstance(value, Tensor) and not value.is_meta and not is_extra(name)
    }
    extra = {name: value for name, value in state.items() if not isinstance(value, Tensor) or is_extra(name)}
    kind = type(model).__name__
    return {"class": kind, "extra": pack(extra, contents.small, group_of("model", index))}


def is_extra(name: str) -> bool:
    """Whether this is what a module's `get_extra_state` returned."""
    return name.rpartition(".")[2] == EXTRA


def parameter_names(optimizer: Optimizer, models: Sequence[nn.Module]) -> list[str]:
    """A name for each of an optimizer's parameters, in their order.

    The model's own names, with the model's group before them if the optimizer updates several models; parameters
    that belong to none are named by their place.
    """
    known: dict[int, tuple[int, str]] = {}
    for index, model in enumerate(models):
        for name, parameter in model.named_parameters():
            known.setdefault(id(parameter), (index, name))
    places = [(g, i, p) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])]
    several = len({known[id(p)][0] for _, _, p in places if id(p) in known}) > 1
    names = []
    for group, place, parameter in places:
        index, name = known.get(id(parameter), (0, f"group_{group}.parameter_{place}"))
        names.append(f"{group_of('model', index)}:{name}" if several else name)
    return names


def _collect_optimizer(
    contents: Contents, index: int, optimizer: Optimizer, models: Sequence[nn.Module]
) -> dict[str, Any]:
    """Add an optimizer's tensors to the contents as `PARAMETER.KEY`; returns the plain values."""
    names, saved, group = parameter_names(optimizer, models), optimizer.state_dict(), group_of("optimizer", index)
    tensors = contents.tensors.setdefault(group, {})
    contents.divided |= any(isinstance(p, Elsewhere) for g in optimizer.param_groups for p in g["params"])
    rest: dict[str, dict[Any, Any]] = {}
    for place, kept in saved["state"].items():
        for key, value in kept.items():
            if isinstance(value, Tensor) and isinstance(key, str) and "." not in key:
                tensors[f"{names[place]}.{key}"] = value, True
            else:
                rest.setdefault(names[place], {})[key] = value
    groups = [{**g, "params": [names[place] for place in g["params"]]} for g in saved["param_groups"]]
    others = {key: value for key, value in saved.items() if key not in ("state", "param_groups")}
    return {
        "class": type(optimizer).__name__,
        "steps": steps_of(optimizer),
        "groups": pack(groups, contents.small, f"{group}.groups"),
        "state": pack(rest, contents.small, f"{group}.state"),
        "others": pack(others, contents.small, group),
    }
