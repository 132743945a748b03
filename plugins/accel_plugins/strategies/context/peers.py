"""What processes that hold different positions tell one another.

Weights are used by all, each on its own positions. What a process computes a weight's gradient to be is not its share
of the sum but `size` times that, so that the mean over the processes is the gradient: also of what all compute alike,
such as a term of the loss on the weights themselves. So nothing is sent where a weight is used, the mean is taken once
at the end, and taking it twice changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accel.runtime.divided.operators import Gather, once, put_together, summed, swapped
from accel.runtime.divided.peers import Peers


@dataclass(eq=False)
class SequencePeers(Peers):
    """The processes of one context axis."""

    axis: str = "context"
    remedy: str = "train this model without `context`"
    method: str = "auto"

    def copy(self, whole: Tensor) -> Tensor:
        """The same tensor: its gradient is averaged at the end, see above."""
        return whole

    def take(self, whole: Tensor, dim: int, outer: int = 1) -> Tensor:
        """The own part: its gradient is averaged at the end, see above."""
        return self.own(whole, dim, outer)

    def gather(self, part: Tensor, dim: int, outer: int = 1, length: int | None = None) -> Tensor:
        """The whole tensor, on all processes, each of which brings its gradient of it."""
        return self.gather_for_parts(part, dim, outer, length)

    def enter(self, whole: Tensor, dim: int | None) -> Tensor:
        """This process's part of an input along `dim`, all of it if None; all get the gradient of the whole."""
        if not whole.requires_grad or not torch.is_grad_enabled():
            return whole if dim is None else self.own(whole, dim).contiguous()
        result: Tensor = _Enter.apply(whole, dim, self)  # type: ignore[no-untyped-call]
        return result

    def leave(self, part: Tensor, dim: int, outer: int) -> Tensor:
        """The whole of an output, of which all processes bring the same gradient."""
        whole: Tensor = _Leave.apply(part, dim, outer, None, self)  # type: ignore[no-untyped-call]
        return whole

    def attention(self, call: Any) -> Any:
        from .attention import attention

        return attention(self, call)

    def swap(self, parts: Tensor) -> Tensor:
        """Entry i of [size, ...] goes to process i; what comes from process i stands there after."""
        swapped: Tensor = _Swap.apply(parts, self)  # type: ignore[no-untyped-call]
        return swapped


@dataclass(eq=False)
class Watching(SequencePeers):
    """Parts that are whole, for finding out what meets in attention."""

    met: set[Any] = field(default_factory=set)

    def meet(self, sources: frozenset[Any]) -> None:
        self.met |= sources


class _Leave(Gather):
    """All parts, put together, in forward; in backward, where all bring the same, no sum has to be asked for."""

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> Any:
        own = ctx.peers.own(gradient, ctx.dim, ctx.outer)
        return own * ctx.peers.parts, None, None, None, None


class _Enter(torch.autograd.Function):
    """The own part, or all, in forward; the mean of the gradients in backward."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int | None, peers: SequencePeers) -> Tensor:
        ctx.dim, ctx.peers = dim, peers
        return whole.view_as(whole) if dim is None else peers.own(whole, dim).clone()

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> Any:
        peers = ctx.peers
        if ctx.dim is not None:
            return put_together(gradient / peers.parts, ctx.dim, 1, None, peers), None, None
        return summed(gradient, peers.group) / peers.parts, None, None


class _Swap(torch.autograd.Function):
    """Entries change places in forward, and back in backward."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, peers: SequencePeers) -> Tensor:
        ctx.peers = peers
        return swapped(parts, peers.group)

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return swapped(gradient, ctx.peers.group), None
