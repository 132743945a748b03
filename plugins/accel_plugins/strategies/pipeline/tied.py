"""Parameters that several stages hold: tied embeddings, blocks that are called in several places.

Each holder's gradient is a part of the sum. The parts are kept apart from the parameter's gradient while a pass is
drained, and what all holders then add is the same sum in the same order: so the copies stay equal to the last bit,
and gradients may add up over several passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from accel.runtime.shards import held_part, like_part

from .wire import Wire


class Tied:
    """`holders` are the processes along the pipeline that hold each such parameter, by name."""

    def __init__(self, model: nn.Module, holders: Mapping[str, Sequence[int]], wire: Wire) -> None:
        self.holders, self.wire = holders, wire
        self._collects = False
        self._sums: dict[str, Tensor] = {}
        self._leaves: dict[str, Tensor] = {}
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for name in holders:
            owner, _, attribute = name.rpartition(".")
            self._places[name] = model.get_submodule(owner), attribute
            self._places[name][0].register_forward_pre_hook(self._watch_module)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside, gradients of these parameters are collected; then all get their sums."""
        self._collects = True
        try:
            yield
        finally:
            self._collects = False
        if self.holders:
            self._exchange()

    def watch(self) -> None:
        """Collect from the parameters as they are now; sharding replaces them while a model computes."""
        for name, (module, attribute) in self._places.items():
            self._watch(name, module._parameters[attribute])

    def _watch_module(self, module: nn.Module, args: Any) -> None:
        for name, (owner, attribute) in self._places.items():
            if owner is module:
                self._watch(name, module._parameters[attribute])

    def _watch(self, name: str, leaf: Tensor | None) -> None:
        if leaf is None or not leaf.requires_grad or leaf.is_meta or self._leaves.get(name) is leaf:
            return
        self._leaves[name] = leaf

        def collect(gradient: Tensor) -> Tensor | None:
            if not self._collects:
                return None
            known = self._sums.get(name)
            self._sums[name] = gradient.clone() if known is None else known.add_(gradient)
            return torch.zeros_like(gradient)

        leaf.register_hook(collect)  # type: ignore[no-untyped-call]

    def _exchange(self) -> None:
        group, me = self.wire.group, self.wire.group.rank()
        mine = torch.tensor([name in self._sums for name in self.holders], dtype=torch.uint8, device=self.wire.device)
        flags = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(flags, mine, group=group)
        brought = torch.stack(flags).tolist()
        for place, (name, holders) in enumerate(self.holders.items()):
            bringing = [rank for rank in holders if brought[rank][place]]
            if me in holders and bringing:
                self._add(name, holders, bringing, me)
        self.wire.finish()

    def _add(self, name: str, holders: Sequence[int], bringing: Sequence[int], me: int) -> None:
        """Give this holder the sum of what all brought."""
        module, attribute = self._places[name]
        leaf: Tensor = self._leaves[name] if name in self._leaves else getattr(module, attribute)
        own = self._sums.pop(name, None)
        if own is not None:
            for other in holders:
                if other != me:
                    self.wire.send_tensor(other, held_part(own))
        like = held_part(leaf if own is None else own)
        parts = [
            held_part(own) if rank == me and own is not None else self.wire.receive_tensor(rank, like)
            for rank in bringing
        ]
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        torch.autograd.backward([leaf], [like_part(total, leaf) if isinstance(leaf, DTensor) else total])
