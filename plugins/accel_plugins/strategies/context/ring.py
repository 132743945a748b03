"""Attention in a ring (Liu et al. 2023): keys and values go from process to process, and meet the own queries.

Softmax is put together from blocks by its running maximum and sum. Backward keeps none of the weights: it computes
each block's again, from the logarithm of the sum of each row (Dao et al. 2022, "FlashAttention"), while keys and
values go round once more with their gradients beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from accel.runtime.divided.operators import once

from .peers import SequencePeers

_SCORES = 1 << 18
"""About how many scores are there at once."""


def ring(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    peers: SequencePeers,
) -> Tensor:
    """Attention of own queries [.., t, width] to the keys and values [.., s, width] of all processes.

    `mask` is of all positions. Memory beside the operands: some rows of a block of scores [.., t, s].
    """
    with torch.autocast(query.device.type, enabled=False):  # backward runs without it too
        result: Tensor = _Ring.apply(query, key, value, _Blocks(mask, causal, scale, peers))  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class _Blocks:
    """The scores of own queries and one process's keys."""

    mask: Tensor | None
    causal: bool
    scale: float
    peers: SequencePeers

    def rows(self, step: int, query: Tensor, key: Tensor) -> Iterator[slice]:
        """Own queries, some at a time: those that may see any of the keys that are here after `step` steps."""
        count = max(_SCORES // max(query[..., 0, 0].numel() * key.shape[-2], 1), 16)
        for start in range(0, query.shape[-2], count):
            rows = slice(start, min(start + count, query.shape[-2]))
            if not self.causal or self._first(step, key) < self._place(query, rows.stop):
                yield rows

    def scores(self, step: int, query: Tensor, rows: slice, key: Tensor) -> Tensor:
        """[.., rows, s] in at least float32; minus infinity where a query may not see a key."""
        scores = (query[..., rows, :] * self.scale) @ key.transpose(-2, -1)
        scores = scores.to(_wide(query))
        mask = self._mask(step, query, rows, key)
        if mask is None:
            return scores
        return scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask

    def _mask(self, step: int, query: Tensor, rows: slice, key: Tensor) -> Tensor | None:
        top, first, count = self._place(query, rows.start), self._first(step, key), rows.stop - rows.start
        if self.causal:
            row = torch.arange(top, top + count, device=query.device)
            return torch.arange(first, first + key.shape[-2], device=query.device) <= row[:, None]
        mask = self.mask
        if mask is None:
            return None
        if mask.dim() > 1 and mask.shape[-2] > 1:
            mask = mask.narrow(-2, top, count)
        return mask.narrow(-1, first, key.shape[-2]) if mask.shape[-1] > 1 else mask

    def _first(self, step: int, key: Tensor) -> int:
        """The place in the sequence of the first of the keys that are here."""
        return int((self.peers.index - step) % self.peers.size * key.shape[-2])

    def _place(self, query: Tensor, row: int) -> int:
        """The place in the sequence of one of the own queries."""
        return self.peers.index * query.shape[-2] + row


class _Ring(torch.autograd.Function):
    """See `ring`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: _Blocks) -> Tensor:
        wide = _wide(query)
        out = query.new_zeros((*query.shape[:-1], value.shape[-1]), dtype=wide)
        total = query.new_zeros((*query.shape[:-1], 1), dtype=wide)
        largest = torch.full_like(total, torch.finfo(wide).min)
        here: Sequence[Tensor] = (key.contiguous(), value.contiguous())
        for step in range(blocks.peers.size):
            arrive = _pass_on(here, blocks.peers) if step < blocks.peers.size - 1 else None
            for rows in blocks.rows(step, query, here[0]):
                state = [tensor[..., rows, :] for tensor in (out, largest, total)]
                _merge(blocks.scores(step, query, rows, here[0]), here[1], *state)
            here = arrive() if arrive else here
        empty = total == 0  # rows that see no key, which get zeros, as in torch
        result = out.div_(total.masked_fill(empty, 1)).to(query.dtype)
        ctx.save_for_backward(query, key, value, result, largest.add_(total.log_()).masked_fill_(empty, torch.inf))
        ctx.blocks = blocks
        return result

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, result, logarithm = ctx.saved_tensors
        blocks: _Blocks = ctx.blocks
        wide = logarithm.dtype
        of_query = torch.zeros_like(query, dtype=wide)
        here: Sequence[Tensor] = (key.contiguous(), value.contiguous())
        back: Sequence[Tensor] = (torch.zeros_like(here[0], dtype=wide), torch.zeros_like(here[1], dtype=wide))
        for step in range(blocks.peers.size):
            arrive = _pass_on(here, blocks.peers) if step < blocks.peers.size - 1 else None
            for rows in blocks.rows(step, query, here[0]):
                own, own_gradient = query[..., rows, :], gradient[..., rows, :]
                towards = (own_gradient.to(wide) * result[..., rows, :].to(wide)).sum(-1, keepdim=True)
                weights = blocks.scores(step, query, rows, here[0]).sub_(logarithm[..., rows, :]).exp_()
                back[1].add_(_product(weights.transpose(-2, -1), own_gradient))
                of_scores = weights.mul_(_product(own_gradient, here[1].transpose(-2, -1)).to(wide).sub_(towards))
                of_query[..., rows, :].add_(_product(of_scores, here[0]), alpha=blocks.scale)
                back[0].add_(_product(of_scores.transpose(-2, -1), own), alpha=blocks.scale)
            back = _pass_on(back, blocks.peers)()
            here = arrive() if arrive else here
        return of_query.to(query.dtype), back[0].to(key.dtype), back[1].to(value.dtype), None


def _merge(scores: Tensor, value: Tensor, out: Tensor, largest: Tensor, total: Tensor) -> None:
    """Take more keys into the running softmax: sums of weighted values, their largest score, and sums of weights."""
    top = torch.maximum(scores.amax(-1, keepdim=True), largest)
    weights = scores.sub_(top).exp_()
    shrink = (largest - top).exp_()
    out.mul_(shrink).add_(_product(weights, value))
    total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
    largest.copy_(top)


def _wide(query: Tensor) -> torch.dtype:
    """In which sums are kept."""
    return torch.float32 if query.dtype.itemsize < 4 else query.dtype


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in the narrower of their dtypes."""
    narrow = min(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
    return left.to(narrow) @ right.to(narrow)


def _pass_on(tensors: Sequence[Tensor], peers: SequencePeers) -> Callable[[], list[Tensor]]:
    """Send tensors to the next process; what is returned waits for those of the one before."""
    received = [torch.empty_like(tensor) for tensor in tensors]
    after, before = (peers.index + 1) % peers.size, (peers.index - 1) % peers.size
    sends = [dist.P2POp(dist.isend, tensor, group=peers.group, group_peer=after) for tensor in tensors]
    receives = [dist.P2POp(dist.irecv, tensor, group=peers.group, group_peer=before) for tensor in received]
    pending = dist.batch_isend_irecv([*sends, *receives])

    def arrive() -> list[Tensor]:
        for work in pending:
            work.wait()
        return received

    return arrive
