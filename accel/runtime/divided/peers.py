"""The processes that share each layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .operators import Add, AddParts, Copy, Deal, Gather, GatherAndAdd, Take, lengths_of


@dataclass(eq=False)
class Peers:
    """The processes of one tensor axis.

    `parts` is the number of parts that tensors are really in: `size`, or 1 while a model is only observed, where
    tensors are whole and `divided_whole` hears of each that a real run would have to put together again.
    """

    size: int
    index: int = 0
    parts: int = 1
    group: ProcessGroup | None = None
    axis: str = "tensor"
    remedy: str = "give the layers that make it `replicate` in strategies.tensor.plan"
    divided_whole: Callable[[frozenset[Any], Undividable], None] | None = None
    sequence: bool = False
    """Whether what layers leave between one another is divided along its positions (Korthikanti et al. 2022)."""

    logits: bool = False
    """Whether what a head over the vocabulary gives stays divided when it leaves the model."""

    begins: Callable[[], None] | None = None
    """Called before each outermost forward of a model."""

    shared: list[Any] = field(default_factory=list)
    """The last input of a divided layer, its state, and what was made of it: query, key and value share one."""

    def copy(self, whole: Tensor) -> Tensor:
        """The same tensor for use on parts of the work: each process adds its share of the gradient."""
        if self.parts == 1 or not _learns(whole):
            return whole
        copied: Tensor = Copy.apply(whole, self.group)  # type: ignore[no-untyped-call]
        return copied

    def forget(self) -> None:
        """No layer will ask for the last input again."""
        self.shared.clear()

    def add(self, share: Tensor) -> Tensor:
        """The sum of what the processes bring, on all of them."""
        if self.parts == 1:
            return share
        total: Tensor = Add.apply(share, self.group)  # type: ignore[no-untyped-call]
        return total

    def largest(self, value: Tensor) -> Tensor:
        """The elementwise maximum of what the processes bring; it has no gradient."""
        if self.parts > 1:
            value = value.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return value

    def add_parts(self, share: Tensor, dim: int, outer: int = 1) -> Tensor:
        """This process's part of the sum of what the processes bring."""
        part: Tensor = AddParts.apply(share, dim, outer, self)  # type: ignore[no-untyped-call]
        return part

    def take(self, whole: Tensor, dim: int, outer: int = 1) -> Tensor:
        """`own`, of a tensor that each process uses a part of: what they make its gradient to be is put together."""
        if self.parts == 1 or not _learns(whole):
            return self.own(whole, dim, outer)
        part: Tensor = Take.apply(whole, dim, outer, self)  # type: ignore[no-untyped-call]
        return part

    def own(self, whole: Tensor, dim: int, outer: int = 1) -> Tensor:
        """This process's part of a tensor that all hold: of each of `outer` equal pieces of a dim, one of `parts`.

        Parts of one piece need not be equal.
        """
        if self.parts == 1:
            return whole
        if outer == 1:
            sizes = lengths_of(whole.shape[dim], self.parts)
            return whole.narrow(dim, sum(sizes[: self.index]), sizes[self.index])
        pieces: Tensor = whole.unflatten(dim, (outer, self.parts, -1)).select(dim + 1, self.index)  # type: ignore[no-untyped-call]
        return pieces.flatten(dim, dim + 1)

    def gather(self, part: Tensor, dim: int, outer: int = 1, length: int | None = None) -> Tensor:
        """The whole tensor, on all processes: the reverse of `own`. Each brings the whole gradient."""
        if self.parts == 1:
            return part
        whole: Tensor = Gather.apply(part, dim, outer, length, self)  # type: ignore[no-untyped-call]
        return whole

    def gather_for_parts(self, part: Tensor, dim: int, outer: int = 1, length: int | None = None) -> Tensor:
        """`gather` and `copy` in one: the whole for use on parts of the work. Each brings its share of the gradient."""
        if self.parts == 1:
            return part
        whole: Tensor = GatherAndAdd.apply(part, dim, outer, length, self)  # type: ignore[no-untyped-call]
        return whole

    def deal(self, part: Tensor, dim: int, outer: int) -> Tensor:
        """From one of `parts` consecutive parts of a dim to one of each of `outer` equal pieces of it.

        So a weight of which processes hold consecutive rows, as checkpoints and optimizers see it, is worked on with
        rows of query, key and value each. Only rows that another process holds are sent.
        """
        if self.parts == 1 or outer == 1:
            return part
        dealt: Tensor = Deal.apply(part, dim, outer, self)  # type: ignore[no-untyped-call]
        return dealt

    def attention(self, call: Any) -> Any:
        """scaled_dot_product_attention, called on queries of which each process has some positions."""
        raise Undividable("attention sums over what would be divided")

    def meet(self, sources: frozenset[Any]) -> None:
        """Called where each position of what comes from `sources` meets all positions."""

    @contextlib.contextmanager
    def own_numbers(self, device: torch.device) -> Iterator[None]:
        """Inside, each process draws random numbers of its own; after it, all go on alike.

        They follow from what all would draw next, so that recomputing a forward pass draws the same ones again.
        """
        if self.parts == 1:
            yield
            return
        seed = int(torch.randint(2**48, ())) + self.index
        numbers: Any = torch.random if device.type == "cpu" else torch.get_device_module(device)
        before = numbers.get_rng_state()
        (torch.default_generator if device.type == "cpu" else numbers).manual_seed(seed)
        try:
            yield
        finally:
            numbers.set_rng_state(before)


class Undividable(Exception):
    """Something that cannot be done part by part; the message says what.

    `indivisible` if for a number alone; `pieces` if it could be with a part of each of so many equal pieces.
    """

    def __init__(self, reason: str, indivisible: bool = False, pieces: int = 1) -> None:
        super().__init__(reason)
        self.indivisible, self.pieces = indivisible, pieces


def _learns(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()
