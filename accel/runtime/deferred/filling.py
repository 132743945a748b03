"""From a model without memory to one that trains: memory for the parts that a process holds, then their values.

A value comes from a folder of weights, or is made as the model's own program made it: whole, one parameter after the
other, on rank 0, which sends it to all. So it is the same for any number of processes, and no process ever holds more
than its own parts and the parameter under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from ...errors import PrepareError
from ..checkpoint.parts import box_of
from ..shards import Elsewhere, held_part, like_part
from ..world import World
from .operations import View, blank
from .parameters import replace_parameters
from .tape import Tape


def is_empty(parameter: nn.Parameter) -> bool:
    """Whether this process has yet to give the parameter memory, whole or divided."""
    return parameter.is_meta and not isinstance(parameter, Elsewhere)


def give_memory(model: nn.Module, device: torch.device) -> None:
    """Give empty parameters memory for what this process holds of them, filled with zeros."""

    def real(parameter: nn.Parameter) -> nn.Parameter | None:
        if not is_empty(parameter):
            return None
        part = torch.zeros_like(held_part(parameter), device=device)
        return nn.Parameter(like_part(part, parameter), requires_grad=parameter.requires_grad)

    replace_parameters(model.modules(), real)


class Filling:
    """What is still to be put in a model's parameters; all ranks make one together, before the model is set up.

    `tapes` may know how parameters are made. `load` reads those for which there are weights in a folder, and returns
    their names. Raises PrepareError for a buffer without a value.
    """

    def __init__(self, model: nn.Module, tapes: Sequence[Tape], world: World, load: Callable[[], set[str]]) -> None:
        self.model, self.world, self._load = model, world, load
        self._empty: dict[str, View | None] = {
            name: next(filter(None, (tape.find(parameter) for tape in tapes)), None)
            for name, parameter in model.named_parameters()
            if is_empty(parameter)
        }
        for name, buffer in model.named_buffers():
            if buffer.is_meta:
                raise PrepareError(
                    f"prepare: buffer {name!r} of this {type(model).__name__} has no value: it was made on the meta "
                    "device; make the model under accelerator.empty_init(), which computes buffers"
                )

    def fill(self, device: torch.device) -> set[str]:
        """Fill all that is empty; all ranks. Returns the names of parameters that nothing gives a value."""
        values, self._empty = self._empty, {}
        if not values:
            return set()
        give_memory(self.model, device)
        loaded = self._load()
        for name, value in values.items():
            if value is not None and name not in loaded:
                self._put(name, value, device)
        unknown = (name for name, value in values.items() if value is None and name not in loaded)
        return {name for name in unknown if self.model.get_parameter(name).numel()}

    @torch.no_grad()
    def _put(self, name: str, value: View, device: torch.device) -> None:
        """Give this process its part of a parameter's value."""
        parameter = self.model.get_parameter(name)
        if self.world.rank == 0:
            whole = value.make().contiguous().to(device)
        else:
            whole = blank(torch.empty(value.size, dtype=value.dtype, device="meta")).to(device)
        if self.world.size > 1:
            dist.broadcast(whole, src=0)
        if not isinstance(parameter, Elsewhere):
            box = box_of(name, parameter)
            for dim, (offset, length) in enumerate(zip(box.offset, box.shape, strict=True)):
                whole = whole.narrow(dim, offset, length)
            held_part(parameter).copy_(whole)
