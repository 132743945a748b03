"""Every way into a sharded model: its forward, a part of it called on its own, a method that uses its parameters.

Torch gathers the parameters that no block holds when the model's own forward begins. A loop may as well call
`model.encoder(x)` and then `model.head(h)`; here each of these counts as a forward of what no block holds.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from accel.errors import PrepareError

from .exchange import Exchange
from .groups import begin_again


class Entries:
    """Gathers before, and cleans up after, whatever outermost call reaches a model."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], exchange: Exchange) -> None:
        self.model, self.exchange, self.groups = model, exchange, exchange.groups
        self._inside_blocks = {id(module) for block in blocks for module in block.modules()}
        self._order: _Order | None = None
        self._depth = 0
        model.register_forward_pre_hook(self._enter_forward, prepend=True)
        model.register_forward_hook(self._leave_forward, always_call=True)
        for block in blocks:
            state = block._get_fsdp_state()  # type: ignore[operator]
            block.register_forward_pre_hook(functools.partial(begin_again, state), prepend=True)
        for part in self._parts():
            part.register_forward_pre_hook(self._enter_part, prepend=True, with_kwargs=True)
            part.register_forward_hook(self._leave_part, always_call=True)
        self._entered: nn.Module | None = None

    def wrap_methods(self, names: Iterable[str]) -> None:
        """Let these methods find the model's own parameters gathered."""
        for name in names:
            self._replace(name, self._call)

    def explain_methods(self, setting: str) -> None:
        """Let the class's other methods say what they need if they use the model's own parameters."""
        kinds = type(self.model).__mro__
        for kind in kinds[: kinds.index(nn.Module)]:
            for name, value in vars(kind).items():
                own = inspect.isfunction(value) and not name.startswith("_") and not hasattr(FSDPModule, name)
                if own and not hasattr(nn.Module, name) and name not in self.model.__dict__:
                    advice = (
                        f"{name}(): uses parameters of the model itself, of which this process holds only a part; name "
                        f"the method in the settings, as in {setting}: [{name}]"
                    )
                    self._replace(name, functools.partial(_explain, advice))

    def explain_forward(self, setting: str) -> None:
        """Let forward say what to do if it meets a divided parameter."""
        inside = (
            "forward(): uses a block's parameters other than by calling the block, as block.weight or block.forward() "
            f"do, and this process holds only a part of them; call the block, or set {setting} to modules that are "
            "only called"
        )
        outside = (
            "forward(): was called past the hooks that gather the model's parameters; call the model itself, and let "
            "its class's own __call__, if it has one, call super().__call__"
        )

        def explain(method: Any, *args: Any, **kwargs: Any) -> Any:
            return _explain(inside if self._depth else outside, method, *args, **kwargs)

        self._replace("forward", explain)

    def _replace(self, name: str, caller: Callable[..., Any]) -> None:
        method = getattr(self.model, name)

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            return caller(method, *args, **kwargs)

        self.model.__dict__[name] = call

    def gather_in_order(self) -> None:
        """From now on, each forward gathers all groups in one order, whichever of them this process needs.

        So processes may differ in the blocks that they use: their collectives still fit together. Where models
        use all blocks in their order, it changes nothing.
        """
        self._order = _Order(self.groups.all)

    def _parts(self) -> list[nn.Module]:
        """The modules that can be called on their own and need what no block holds."""
        modules = [m for m in self.model.modules() if m is not self.model and id(m) not in self._inside_blocks]
        return [m for m in modules if next(m.parameters(), None) is not None]

    def _call(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._depth:
            self.exchange.begin_forward(self.groups.rest)
        self._depth += 1
        try:
            args, kwargs = self.groups.root._pre_forward(self.model, args, kwargs)
            return self.groups.root._post_forward(self.model, args, method(*args, **kwargs))
        finally:
            self._leave()

    def _enter_forward(self, module: nn.Module, args: Any) -> None:
        if not self._depth:
            self.exchange.begin_forward(self.groups.all)
            if self._order is not None:
                self._order.begin()
        self._depth += 1

    def _leave_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._depth:
            return  # it was refused before it began
        if self._depth == 1 and self._order is not None:
            self._order.end(broken_off=self.groups.interrupted)
        self._leave()

    def _enter_part(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._depth or not self.groups.idle:
            return None
        self.exchange.begin_forward(self.groups.rest)
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
        if torch.is_grad_enabled() or self.groups.kept:
            self.groups.hide()
        else:
            self.groups.reshard()


def _explain(advice: str, method: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a method, and give advice if it meets a divided parameter."""
    try:
        return method(*args, **kwargs)
    except RuntimeError as error:
        if "mixed torch.Tensor and DTensor" not in str(error):
            raise
        raise PrepareError(advice) from error


class _Order:
    """Lets every forward of the whole model gather each group once, in order, before those that follow it."""

    def __init__(self, groups: list[Any]) -> None:
        self.groups = groups
        self._passed: set[int] | None = None
        for index, group in enumerate(groups):
            group.unshard = functools.partial(self._unshard, index, group.unshard)

    def begin(self) -> None:
        """A forward of the whole model begins."""
        self._passed = set()

    def end(self, broken_off: bool) -> None:
        """Gather what this forward did not need, unless an exception ended it."""
        if not broken_off:
            self._pass(len(self.groups))
            for group in self.groups:
                if group._all_gather_result is not None:  # gathered ahead, and then not used
                    self._end_gathering(group)
        self._passed = None

    def _unshard(self, index: int, unshard: Any, async_op: bool = False) -> None:
        if self._passed is not None:
            self._pass(index)
            self._passed.add(index)
        unshard(async_op)

    def _pass(self, end: int) -> None:
        assert self._passed is not None
        for index, group in enumerate(self.groups[:end]):
            if index not in self._passed:
                self._passed.add(index)
                if not group.is_unsharded:
                    group.unshard()
                    self._end_gathering(group)

    def _end_gathering(self, group: Any) -> None:
        group.wait_for_unshard()
        if group._reshard_after_forward:
            group._to_sharded()
