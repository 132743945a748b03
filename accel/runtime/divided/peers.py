"""The processes that share each layer, and what they tell one another in forward and backward.

Megatron-LM (Shoeybi et al. 2019) calls the first two of these its operators f and g: what is copied in forward is
added up in backward, and the other way round.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


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
    copied: list[Any] = field(default_factory=list)
    """The last input of a divided layer, its version, and its `copy`: those of query, key and value share one."""

    def copy(self, whole: Tensor) -> Tensor:
        """The same tensor for use on parts of the work: each process adds its share of the gradient."""
        if self.parts == 1 or not (whole.requires_grad and torch.is_grad_enabled()):
            return whole
        copied: Tensor = _Copy.apply(whole, self.group)  # type: ignore[no-untyped-call]
        return copied

    def copy_once(self, whole: Tensor) -> Tensor:
        """`copy`, shared by all layers that take this very tensor one after another: one exchange, not three."""
        if self.parts == 1 or not (whole.requires_grad and torch.is_grad_enabled()):
            return whole
        if not self.copied or self.copied[0] is not whole or self.copied[1] != whole._version:
            self.copied[:] = [whole, whole._version, self.copy(whole)]
        result: Tensor = self.copied[2]
        return result

    def forget(self) -> None:
        """No layer will ask for the last input again."""
        self.copied.clear()

    def add(self, share: Tensor) -> Tensor:
        """The sum of what the processes bring, on all of them."""
        if self.parts == 1:
            return share
        total: Tensor = _Add.apply(share, self.group)  # type: ignore[no-untyped-call]
        return total

    def own(self, whole: Tensor, dim: int, outer: int = 1) -> Tensor:
        """This process's part of a tensor that all hold: of each of `outer` equal pieces of a dim, one of `parts`."""
        if self.parts == 1:
            return whole
        pieces: Tensor = whole.unflatten(dim, (outer, self.parts, -1)).select(dim + 1, self.index)  # type: ignore[no-untyped-call]
        return pieces.flatten(dim, dim + 1)

    def gather(self, part: Tensor, dim: int, outer: int = 1) -> Tensor:
        """The whole tensor, on all processes: the reverse of `own`. Each brings the whole gradient."""
        if self.parts == 1:
            return part
        whole: Tensor = Gather.apply(part, dim, outer, self)  # type: ignore[no-untyped-call]
        return whole

    def deal(self, part: Tensor, dim: int, outer: int) -> Tensor:
        """From one of `parts` consecutive parts of a dim to one of each of `outer` equal pieces of it.

        So a weight of which processes hold consecutive rows, as checkpoints and optimizers see it, is worked on with
        rows of query, key and value each. Only rows that another process holds are sent.
        """
        if self.parts == 1 or outer == 1:
            return part
        dealt: Tensor = _Deal.apply(part, dim, outer, self)  # type: ignore[no-untyped-call]
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


def summed(share: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of what the processes bring, in new memory: a gradient may be another's too, a share may be kept."""
    total = share.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Copy(torch.autograd.Function):
    """Nothing in forward; the sum over the processes in backward."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return summed(gradient, ctx.group), None


class _Add(torch.autograd.Function):
    """The sum over the processes in forward; nothing in backward, where all hold the same gradient."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, group: ProcessGroup) -> Tensor:
        return summed(share, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


class Gather(torch.autograd.Function):
    """All parts, put together, in forward; the own part of the gradient in backward."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, outer: int, peers: Peers) -> Tensor:
        ctx.dim, ctx.outer, ctx.peers = dim, outer, peers
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(peers.parts)]
        dist.all_gather(parts, part, group=peers.group)
        pieces = [piece.unflatten(dim, (outer, -1)) for piece in parts]  # type: ignore[no-untyped-call]
        return torch.cat(pieces, dim + 1).flatten(dim, dim + 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.peers.own(gradient, ctx.dim, ctx.outer).contiguous(), None, None, None


class _Deal(torch.autograd.Function):
    """Rows go to those who work on them in forward; their gradients come back in backward."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, outer: int, peers: Peers) -> Tensor:
        ctx.dim, ctx.outer, ctx.peers = dim, outer, peers
        order, sends, comes = _blocks(outer, peers)
        rows = part.movedim(dim, 0).unflatten(0, (outer, -1))[order].contiguous()  # type: ignore[no-untyped-call]
        dealt = torch.empty_like(rows)
        dist.all_to_all_single(dealt, rows, comes, sends, group=peers.group)
        return dealt.flatten(0, 1).movedim(0, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        order, sends, comes = _blocks(ctx.outer, ctx.peers)
        rows = gradient.movedim(ctx.dim, 0).unflatten(0, (ctx.outer, -1)).contiguous()  # type: ignore[no-untyped-call]
        back = torch.empty_like(rows)
        dist.all_to_all_single(back, rows, sends, comes, group=ctx.peers.group)
        own = torch.empty_like(back)
        own[order] = back
        return own.flatten(0, 1).movedim(0, ctx.dim), None, None, None


def _blocks(outer: int, peers: Peers) -> tuple[list[int], list[int], list[int]]:
    """Of the `outer` blocks that each holds: their order by who works on them, and how many go to and come from each.

    Block b of all is held by process b // outer, and worked on by process b % parts.
    """
    mine = [peers.index * outer + block for block in range(outer)]
    order = sorted(range(outer), key=lambda block: mine[block] % peers.parts)
    sends = [sum(block % peers.parts == other for block in mine) for other in range(peers.parts)]
    theirs = [range(other * outer, (other + 1) * outer) for other in range(peers.parts)]
    comes = [sum(block % peers.parts == peers.index for block in blocks) for blocks in theirs]
    return order, sends, comes
