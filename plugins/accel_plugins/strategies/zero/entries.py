"""Every way into a sharded model: its forward, a part of it called on its own, a method that uses its parameters.

Torch gathers the parameters that no block holds when the model's own forward begins. A loop may as well call
`model.encoder(x)` and then `model.head(h)`; here each of these counts as a forward of what no block holds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from accel.errors import PrepareError

from .groups import Groups


class Entries:
    """Gathers before, and cleans up after, whatever outermost call reaches a model."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], groups: Groups) -> None:
        self.model, self.groups = model, groups
        self._inside_blocks = {id(module) for block in blocks for module in block.modules()}
        self._gather_all = False
        self._depth = 0
        model.register_forward_pre_hook(self._enter_forward, prepend=True)
        model.register_forward_hook(self._leave_forward, always_call=True)
        for part in self._parts():
            part.register_forward_pre_hook(self._enter_part, prepend=True, with_kwargs=True)
            part.register_forward_hook(self._leave_part, always_call=True)
        self._entered: nn.Module | None = None

    def wrap_methods(self, names: Iterable[str], setting: str) -> None:
        """Let these methods find the model's own parameters gathered. Raises PrepareError, of `setting`, if one is missing."""
        for name in names:
            method = getattr(self.model, name, None)
            if not callable(method):
                raise PrepareError(f"{setting}: {type(self.model).__name__} has no method {name!r}")
            self.model.__dict__[name] = functools.partial(self._call, method)

    def gather_in_order(self) -> None:
        """From now on, each forward gathers all groups in one order, whichever of them this process needs.

        Where parameters stay gathered until backward this costs no memory, and it lets processes differ in the
        blocks that they use: their collectives still fit together.
        """
        self._gather_all = True
        for index, group in enumerate(self.groups.all):
            group.unshard = functools.partial(self._unshard, self.groups.all[:index], group, group.unshard)

    def _parts(self) -> list[nn.Module]:
        """The modules that can be called on their own and need what no block holds."""
        modules = [m for m in self.model.modules() if m is not self.model and id(m) not in self._inside_blocks]
        return [m for m in modules if next(m.parameters(), None) is not None]

    def _call(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        self._depth += 1
        try:
            args, kwargs = self.groups.root._pre_forward(self.model, args, kwargs)
            return self.groups.root._post_forward(self.model, args, method(*args, **kwargs))
        finally:
            self._leave()

    def _enter_forward(self, module: nn.Module, args: Any) -> None:
        self._depth += 1

    def _leave_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self._leave()

    def _enter_part(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._depth or not self.groups.idle:
            return None
        self._depth += 1
        self._entered = module
        return self.groups.root._pre_forward(module, args, kwargs)

    def _leave_part(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._entered is not module:
            return None
        self._entered = None
        try:
            return self.groups.root._post_forward(module, args, output)
        finally:
            self._leave()

    def _leave(self) -> None:
        self._depth -= 1
        if self._depth:
            return
        if self.groups.interrupted:
            self.groups.recover()
        if self._gather_all:
            for group in self.groups.all:
                group.unshard()
                group.wait_for_unshard()
        if torch.is_grad_enabled():
            self.groups.hide()
        else:
            self.groups.reshard()

    def _unshard(self, earlier: list[Any], group: Any, unshard: Any, async_op: bool = False) -> None:
        if not _gathered(group):
            for other in earlier:
                if not _gathered(other):
                    other.unshard()
                    other.wait_for_unshard()
        unshard(async_op)


def _gathered(group: Any) -> bool:
    """Whether a group's parameters are gathered, or on their way."""
    return group.is_unsharded or group._all_gather_result is not None
