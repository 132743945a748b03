"""Other parameters in the place of a model's own."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def replace_parameters(modules: Iterable[nn.Module], make: Callable[[nn.Parameter], nn.Parameter | None]) -> None:
    """Give modules what `make` returns for each parameter, asked once for each; None leaves it as it is.

    Where it can be, the old object becomes the new parameter, so that whoever refers to it has that too.
    """
    new: dict[int, nn.Parameter | None] = {}
    kept = []
    for module in modules:
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in new:
                kept.append(parameter)  # alive, so that its id stays its own
                new[id(parameter)] = _become(parameter, make(parameter))
            replacement = new[id(parameter)]
            if replacement is not None:
                setattr(module, name, replacement)


def _become(old: nn.Parameter, new: nn.Parameter | None) -> nn.Parameter | None:
    """What has to be put in the old one's place: nothing, if it could become the new one."""
    if new is None:
        return None
    new.__dict__.update(old.__dict__)
    if weakref.getweakrefs(old) or isinstance(old, DTensor) or old._use_count() > 1:  # type: ignore[attr-defined]
        return new  # torch cannot swap these, of which the last are in a graph
    torch.utils.swap_tensors(old, new)  # type: ignore[no-untyped-call]
    return None
