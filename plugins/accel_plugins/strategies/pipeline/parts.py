"""The parts of a model that compute on one stage each, and what happens when the user's forward calls one.

A part is a block, or a module outside of all blocks that has parameters. What contains blocks is open: its own
forward runs on every stage, with whatever it computes itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from accel.runtime.adopt import PART, Adopted, Part, adopt
from accel.runtime.blocks import computes


class Listener(Protocol):
    """What is told when a part is called."""

    inside: bool
    """Whether a part is computing: the parts within it are its own affair."""

    def call(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The result of a call of the part `name`, which `forward` would compute."""


class Stage:
    """What the parts of one model have in common: who listens at the moment; None outside of a forward.

    There, `outside` has the calls of parts that learn nothing, with the arguments of `Listener.call`.
    """

    def __init__(self) -> None:
        self.listener: Listener | None = None
        self.outside: Callable[..., Any] | None = None


class StagedPart(Part):
    """What accel knows of a part: its name and its stage."""

    def __init__(self, name: str, stage: Stage) -> None:
        super().__init__()
        self.name, self.stage = name, stage


class Staged(Adopted):
    """Mixin of parts."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        part: StagedPart = self.__dict__[PART]
        forward: Callable[..., Any] = super().__call__  # type: ignore[misc]
        listener, outside = part.stage.listener, part.stage.outside
        if listener is None and outside is not None and not torch.is_grad_enabled():
            return outside(part.name, forward, args, kwargs)
        if listener is None or listener.inside:
            return forward(*args, **kwargs)
        return listener.call(part.name, forward, args, kwargs)


def find_parts(model: nn.Module, blocks: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """The parts of a model by name: the outermost modules that hold no block, and can be called."""
    closed = {id(block) for block in blocks}
    open_modules = {
        id(module) for module in model.modules() if any(id(m) in closed for m in module.modules() if m is not module)
    }
    found: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            place = f"{name}.{child_name}" if name else child_name
            if id(child) in closed or (id(child) not in open_modules and computes(child)):
                found.setdefault(place, child)
            else:
                visit(place, child)

    visit("", model)
    first = {id(module): name for name, module in reversed(found.items())}
    return {name: module for name, module in found.items() if first[id(module)] == name}


def listen_to(parts: dict[str, nn.Module]) -> Stage:
    """Let the parts tell when they are called; in place."""
    stage = Stage()
    for name, module in parts.items():
        adopt(module, Staged, StagedPart(name, stage))
    return stage
