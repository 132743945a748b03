"""Operations on tensors as they are written down, and how they are done again."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ...errors import PrepareError

SMALL = 1 << 16
"""Bytes up to which parameters keep their memory while a model is built, and tensors from elsewhere are copied.

Larger ones from elsewhere must stay as they are until they are read.
"""

RESERVES = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
"""Operations that give memory without a value."""


class Memory:
    """The memory behind some tensors: its size in bytes, and the operation that wrote there last, if any has.

    It is `hollow` if nothing is really there, and `made` once the tape knows what has made it.
    """

    def __init__(self, size: int) -> None:
        self.size, self.hollow, self.made = size, False, False
        self.last: Operation | None = None


@dataclass(frozen=True, eq=False)
class View:
    """A tensor by its place in memory, and what had been written there when it was used."""

    memory: Memory
    written: Operation | None
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def within(self, storage: torch.UntypedStorage) -> Tensor:
        """The tensor in this memory."""
        empty = torch.empty(0, dtype=self.dtype)
        return empty.set_(storage, self.offset, self.size, self.stride)

    @property
    def covers(self) -> bool:
        """Whether the tensor is all that is in its memory, each byte once."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        elements = torch.Size(self.size).numel()
        return elements == span and elements * self.dtype.itemsize == self.memory.size

    def make(self) -> Tensor:
        """The tensor's value, on the CPU in memory of its own. Random generators stay as they are."""
        operations: set[Operation] = set()
        waiting = [self.written]
        while waiting:
            operation = waiting.pop()
            if operation is not None and operation not in operations:
                operations.add(operation)
                waiting.extend(operation.needs)
        held: Held = {}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for operation in sorted(operations, key=lambda operation: operation.place):
                operation.run(held)
        return self.within(reserve(self.memory, held))


Held = dict[Memory, torch.UntypedStorage]


@dataclass(frozen=True, eq=False)
class Operation:
    """One call, with views in the place of tensors.

    `made` tells where the tensors that it returned lie, if it made their memory; `state` how the random generator
    was, if it drew numbers; `place` is its position on the tape, and `needs` what has to be done before.
    """

    place: int
    function: Callable[..., Any]
    args: Any
    kwargs: Any
    needs: tuple[Operation, ...]
    made: tuple[View | None, ...]
    state: Tensor | None

    def run(self, held: Held) -> None:
        """Call it again, on what was made before."""
        args, kwargs = tree_map_only(
            View, lambda view: view.within(reserve(view.memory, held)), (self.args, self.kwargs)
        )
        if self.state is not None:
            own = kwargs.get("generator") is not None
            generator = torch.Generator() if own else torch.default_generator
            generator.set_state(self.state)
            kwargs = {**kwargs, "generator": generator} if own else kwargs
        for view, result in zip(self.made, tree_leaves(self.function(*args, **kwargs)), strict=True):
            if view is not None:
                if (result.stride(), result.storage_offset()) != (view.stride, view.offset):
                    result = view.within(pages(view.memory.size)).copy_(result)
                held[view.memory] = result.untyped_storage()


def reserve(memory: Memory, held: Held) -> torch.UntypedStorage:
    if memory not in held:
        held[memory] = pages(memory.size)
    return held[memory]


def pages(size: int) -> torch.UntypedStorage:
    """Memory straight from the system, which gives it when it is first written to and has it back when it is freed."""
    return torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8).untyped_storage()


def blank(like: Tensor) -> Tensor:
    """A tensor of this shape to write to."""
    view = View(Memory(span_of(like) * like.itemsize), None, like.dtype, tuple(like.shape), like.stride(), 0)
    return view.within(pages(view.memory.size))


def reader(tensor: Tensor, size: int) -> Callable[[], Tensor]:
    """A function that copies the memory of a tensor from elsewhere, unless that has changed."""
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    if size <= SMALL:
        return whole.clone().clone
    version, shape = tensor._version, tuple(tensor.shape)

    def read() -> Tensor:
        if tensor._version != version:
            raise PrepareError(
                f"prepare: a tensor of shape {shape} from which a parameter was made under empty_init has changed "
                "since; let the model make a copy of it"
            )
        return whole.clone()

    return read


def span_of(tensor: Tensor) -> int:
    """Elements from a tensor's first in memory to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in lists, dicts and the like."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def name_of(function: Any) -> str:
    """An operation's name, without those of its namespace and overload."""
    return str(function._schema.name.partition("::")[2])


def written_to(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among the arguments that an operation writes to."""
    written = []
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[place] if place < len(args) else kwargs.get(argument.name))
    return tensors_in(written)


def only_looks(function: Any, written: list[Tensor]) -> bool:
    """Whether an operation returns the same memory in another shape, without reading it; it has `written` to these."""
    if torch.Tag.inplace_view in function.tags:
        return True
    aliases = [value.alias_info for value in function._schema.returns]
    return not written and bool(aliases) and all(alias is not None for alias in aliases)
