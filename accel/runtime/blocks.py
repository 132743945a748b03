"""The repeated blocks of a model, found from its structure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations as kind_of  # else each is of a class of its own

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def repeated_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost children of one class in a list, dict or sequence of modules, in order; they have parameters."""
    kinds = Counter(kind_of(child) for child in module.children() if computes(child) and has_parameters(child))
    for child in module.children():
        if isinstance(module, _CONTAINERS) and kinds[kind_of(child)] > 1:
            yield child
        else:
            yield from repeated_modules(child)


def computes(module: nn.Module) -> bool:
    """Whether a module can be called; lists and dicts of modules cannot."""
    return type(module).forward is not nn.Module.forward


def has_parameters(module: nn.Module) -> bool:
    """Whether a module or one inside it has parameters."""
    return next(module.parameters(), None) is not None
