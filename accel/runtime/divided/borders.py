"""The borders of modules inside a model: where others' hooks look at inputs, and where sequences are put together."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map

from .tensor import Divided, divide, part_of


class Borders:
    """Keeps inputs of modules divided across hooks that are put before ours, such as those of FSDP2.

    It passes inputs through an autograd function of its own, which returns tensors that have forgotten that they are
    parts. So before such hooks parts become plain tensors, and after them divided ones again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.kept: list[list[Any]] = []
        self.handles = {
            module: module.register_forward_pre_hook(self._restore, prepend=True, with_kwargs=True)
            for module in model.modules()
            if module is not model
        }

    def mark(self) -> None:
        """Called when all hooks are there; leaves ours only where others stand before them."""
        for module, handle in self.handles.items():
            if next(iter(module._forward_pre_hooks)) == handle.id:
                handle.remove()
            else:
                module.register_forward_pre_hook(self._strip, prepend=True, with_kwargs=True)
        self.handles.clear()

    def begin(self) -> None:
        """A forward pass begins."""
        self.clear()
        self.mark()

    def clear(self) -> None:
        """A forward pass is over, however it ended."""
        self.kept.clear()

    def _strip(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        divisions: list[Any] = []

        def plain(value: Any) -> Any:
            divisions.append(value.division if isinstance(value, Divided) else None)
            return part_of(value) if isinstance(value, Divided) else value

        stripped = tree_map(plain, (args, kwargs))
        self.kept.append(divisions)
        return stripped

    def _restore(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self.kept:
            return None
        divisions = iter(self.kept.pop())

        def divided(value: Any) -> Any:
            division = next(divisions)
            return value if division is None else divide(value, division)

        return tree_map(divided, (args, kwargs))


class Whereabouts:
    """Which modules put a sequence together while a model runs, and for what; `found` is by name of the module.

    `divided` are those that return a part of one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.current, self.handles = model, [""], []  # type: ignore[var-annotated]
        self.found: dict[str, set[str]] = defaultdict(set)
        self.divided: set[str] = set()

    def __enter__(self) -> Whereabouts:
        for name, module in self.model.named_modules():
            if name:
                before = module.register_forward_pre_hook(lambda *_, name=name: self.current.append(name))
                after = module.register_forward_hook(self._after, always_call=True)
                self.handles += [before, after]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self.current.pop()
        if isinstance(output, Divided) and output.division.sources:
            self.divided.add(name)

    def note(self, sources: Any, reason: Exception) -> None:
        """Something needs the whole of a tensor that is divided."""
        self.found[self.current[-1]].add(str(reason))
