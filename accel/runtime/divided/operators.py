"""What the processes of an axis tell one another in forward, and what follows from it in backward.

Megatron-LM (Shoeybi et al. 2019) calls `Copy` and `Add` its operators f and g: what is copied in forward is added up
in backward, and the other way round. Korthikanti et al. 2022 put in their places, for divided sequences, `GatherAndAdd`
and `AddParts`: a gather is half an all-reduce, and adding up parts is the other half.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ...errors import PrepareError

if TYPE_CHECKING:
    from .peers import Peers


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a backward refuse to be differentiated itself: torch's own mark of it is lost on DTensors (2.11)."""

    @functools.wraps(backward)
    def call(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise PrepareError(
                "backward: gradients of gradients (create_graph=True) do not go through a model whose layers or "
                "sequences are divided among processes; use a strategy of the data axis alone, such as zero3"
            )
        return backward(ctx, *gradients)

    return call


def summed(share: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of what the processes bring, in new memory: a gradient may be another's too, a share may be kept."""
    total = share.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def lengths_of(length: int, parts: int) -> list[int]:
    """The length of each part of a dim; the first ones have one more where it does not divide evenly."""
    return [length // parts + (part < length % parts) for part in range(parts)]


def put_together(part: Tensor, dim: int, outer: int, length: int | None, peers: Peers) -> Tensor:
    """The whole of which each process brings a part, of each of `outer` pieces; `length` is its own where uneven."""
    sizes = [part.shape[dim]] * peers.parts if length is None else lengths_of(length, peers.parts)
    if part.shape[dim] < sizes[0]:
        missing = list(part.shape)
        missing[dim] = sizes[0] - part.shape[dim]
        part = torch.cat([part, part.new_zeros(missing)], dim)
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(peers.parts)]
    dist.all_gather(parts, part, group=peers.group)
    if length is not None:
        return torch.cat([piece.narrow(dim, 0, size) for piece, size in zip(parts, sizes, strict=True)], dim)
    pieces = [piece.unflatten(dim, (outer, -1)) for piece in parts]  # type: ignore[no-untyped-call]
    return torch.cat(pieces, dim + 1).flatten(dim, dim + 1)


def sum_of_parts(whole: Tensor, dim: int, outer: int, peers: Peers) -> Tensor:
    """This process's part of the sum of what the processes bring: half of an all-reduce's bytes.

    gloo's own reduce-scatter is an all-reduce underneath. The sum is taken in the order of the processes.
    """
    if outer > 1:
        pieces = whole.unflatten(dim, (outer, peers.parts, -1)).movedim(dim + 1, 0)  # type: ignore[no-untyped-call]
        return swapped(pieces, peers.group).sum(0).flatten(dim, dim + 1)
    rows = whole.movedim(dim, 0).contiguous()
    sizes = lengths_of(rows.shape[0], peers.parts)
    own = sizes[peers.index]
    received = rows.new_empty([peers.parts, own, *rows.shape[1:]])
    dist.all_to_all_single(received.flatten(0, 1), rows, [own] * peers.parts, sizes, group=peers.group)
    return received.sum(0).movedim(0, dim).contiguous()


def swapped(parts: Tensor, group: ProcessGroup | None) -> Tensor:
    """Entry i of [processes, ...] goes to process i; what comes from process i stands there after."""
    received = torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
    dist.all_to_all_single(received, parts.contiguous(), group=group)
    return received


class Copy(torch.autograd.Function):
    """Nothing in forward; the sum over the processes in backward."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return summed(gradient, ctx.group), None


class Add(torch.autograd.Function):
    """The sum over the processes in forward; nothing in backward, where all hold the same gradient."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, group: ProcessGroup) -> Tensor:
        return summed(share, group)

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


class Gather(torch.autograd.Function):
    """All parts, put together, in forward; the own part of the gradient in backward."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, outer: int, length: int | None, peers: Peers) -> Tensor:
        ctx.dim, ctx.outer, ctx.peers = dim, outer, peers
        return put_together(part, dim, outer, length, peers)

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.peers.own(gradient, ctx.dim, ctx.outer).contiguous(), None, None, None, None


class GatherAndAdd(Gather):
    """All parts, put together, in forward; the own part of the gradients' sum in backward."""

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return sum_of_parts(gradient, ctx.dim, ctx.outer, ctx.peers), None, None, None, None


class AddParts(torch.autograd.Function):
    """The own part of the sum over the processes in forward; all gradients, put together, in backward."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, dim: int, outer: int, peers: Peers) -> Tensor:
        ctx.dim, ctx.outer, ctx.peers, ctx.length = dim, outer, peers, uneven(share.shape[dim], peers.parts)
        return sum_of_parts(share, dim, outer, peers)

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return put_together(gradient, ctx.dim, ctx.outer, ctx.length, ctx.peers), None, None, None


class Take(torch.autograd.Function):
    """The own part in forward; all gradients, put together, in backward."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int, outer: int, peers: Peers) -> Tensor:
        ctx.dim, ctx.outer, ctx.peers, ctx.length = dim, outer, peers, uneven(whole.shape[dim], peers.parts)
        return peers.own(whole, dim, outer).clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return put_together(gradient, ctx.dim, ctx.outer, ctx.length, ctx.peers), None, None, None


def uneven(length: int, parts: int) -> int | None:
    """A length that does not divide by the number of parts; None if it does."""
    return length if length % parts else None


class Deal(torch.autograd.Function):
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
    @once
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
