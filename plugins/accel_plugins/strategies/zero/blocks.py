"""What to gather and free as one: the repeated blocks of a model, found from its structure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain

from torch import nn

from accel.errors import PrepareError
from accel.runtime.blocks import computes, has_parameters, repeated_modules


def find_blocks(model: nn.Module, patterns: Sequence[str], minimum_size: int, setting: str) -> list[nn.Module]:
    """The modules of a model to gather and free as one, in the order in which they stand in it.

    By default the outermost children of one class in a list, dict or sequence of modules, of at least
    `minimum_size` parameters. `patterns` name modules instead; `*` stands for anything but a dot. A module that
    shares a parameter with others stays with the rest of the model. Raises PrepareError for a pattern, of
    `setting`, that fits no module.
    """
    found = _named(model, patterns, setting) if patterns else list(repeated_modules(model))
    if not patterns:
        found = [block for block in found if sum(p.numel() for p in block.parameters()) >= max(minimum_size, 1)]
    shared = _shared_parameters(model, found)
    return [block for block in found if block is not model and shared.isdisjoint(map(id, block.parameters()))]


def _named(model: nn.Module, patterns: Sequence[str], setting: str) -> list[nn.Module]:
    modules = {name: module for name, module in model.named_modules() if computes(module) and has_parameters(module)}
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        expression = re.compile(re.escape(pattern).replace(r"\*", "[^.]*"))
        matches = {name: module for name, module in modules.items() if expression.fullmatch(name)}
        if not matches:
            raise PrepareError(
                f"{setting}: {pattern!r} names no module of {type(model).__name__} that has parameters and a forward; "
                f"it has: {', '.join(list(modules)[1:20])}"
            )
        found |= matches
    return [m for name, m in modules.items() if name in found and not any(name.startswith(f"{o}.") for o in found)]


def _shared_parameters(model: nn.Module, blocks: Sequence[nn.Module]) -> set[int]:
    """Ids of the parameters that a block shares with another block, or with the rest of the model."""
    inside = {id(module) for block in blocks for module in block.modules()}
    rest = (module for module in model.modules() if id(module) not in inside)
    places = [{id(parameter) for parameter in block.parameters()} for block in blocks]
    places.append({id(parameter) for module in rest for parameter in module.parameters(recurse=False)})
    owners = Counter(chain.from_iterable(places))
    return {parameter for parameter, count in owners.items() if count > 1}
