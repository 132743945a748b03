"""Parameters and gradients go from process to process, from where they lie to where they are needed.

Torch packs a group's parameters into one buffer, has the backend gather that, and copies out again; so it does with
gradients. gloo packs once more underneath, and its reduce-scatter is an all-reduce. In main memory these copies, and
the system filling fresh pages with zeros, cost more than the sending itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_common import DDPMeshInfo, TrainingState

from .groups import whole_gradient

_LOT_BYTES = 8 << 20
"""What is received at once, before it is added up; this memory is kept. Less makes more processes wait more often."""

_LINE_BYTES = 64
"""What is received begins at a multiple of this."""

_SUM_BYTES = 1 << 18
"""What is added up at once: stays in a core's cache until it is divided."""


class Peers:
    """The processes that a model is divided among, as one of them sees them."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.others = [rank for rank in range(self.size) if rank != self.rank]
        self.scratch = torch.empty(_LOT_BYTES, dtype=torch.uint8, device=device)
        self._under_way: list[Any] = []
        self._received: list[tuple[Tensor, list[Tensor]]] = []
        self._used = 0

    def gather(self, whole: Tensor, part: Tensor) -> list[Any]:
        """Begin to gather `part` [n] of each process into `whole` [processes * n]; returns what to wait for."""
        parts = whole.view(self.size, -1)
        under_way = [work for rank in self.others for work in self._swap(part, parts[rank], rank)]
        parts[self.rank].copy_(part)
        return under_way

    def _swap(self, sent: Tensor, received: Tensor, rank: int) -> Iterator[Any]:
        """Begin to send and to receive; messages of two processes arrive in the order in which they were sent."""
        if sent.numel():
            yield self.group.send([sent], rank, 0)
        if received.numel():
            yield self.group.recv([received], rank, 0)

    def finish(self) -> None:
        """Wait until all that `reduce` began is sent, received and averaged."""
        for work in self._under_way:
            work.wait()
        for output, parts in self._received:
            _average(output, parts)
        self._under_way, self._received, self._used = [], [], 0

    def reduce(self, output: Tensor, whole: Tensor, length: int) -> None:
        """Begin to average this process's part of `whole` [k] into `output`; parts are of `length`, the last of less.

        The sum is taken in the order of the ranks, so that it does not depend on timing.
        """
        starts = range(0, self.size * length, length)
        parts = [whole[start : start + length] for start in starts]
        lines = _LOT_BYTES // _LINE_BYTES // len(self.others)
        lot = max(lines, 1) * _LINE_BYTES // whole.element_size()
        for start in range(0, length, lot):
            self._reduce_lot(output[start : start + lot], [part[start : start + lot] for part in parts])

    def _reduce_lot(self, output: Tensor, parts: list[Tensor]) -> None:
        own = parts[self.rank]
        room = -(-own.nbytes // _LINE_BYTES) * _LINE_BYTES
        if self._used + room * len(self.others) > _LOT_BYTES:
            self.finish()
        for rank in self.others:
            received = self.scratch[self._used : self._used + own.nbytes].view(own.dtype)
            self._used += room
            self._under_way += self._swap(parts[rank], received, rank)
            parts[rank] = received
        self._received.append((output, parts))


def _average(output: Tensor, parts: list[Tensor]) -> None:
    """The mean of `parts`, each [n], computed in the type of `output` [n]."""
    step = _SUM_BYTES // output.element_size()
    for pieces in zip(*(torch.split(tensor, step) for tensor in (output, *parts)), strict=True):
        total, first, second, *rest = pieces
        if first.dtype == total.dtype:
            torch.add(first, second, out=total)
        else:
            total.copy_(first).add_(second)
        for piece in rest:
            total.add_(piece)
        total.div_(len(parts))


class _UnderWay:
    """What torch looks at to know that a group is being gathered."""

    all_gather_event = all_gather_work = None


class DirectGroup:
    """Gathers and reduces one of torch's parameter groups by way of `peers`.

    Nothing is gathered ahead, unless asked for: it takes the memory of another block.
    """

    def __init__(self, group: Any, peers: Peers, replicas: dist.ProcessGroup | None) -> None:
        self.group, self.peers, self.replicas = group, peers, replicas
        self._under_way: list[Any] = []
        self._keep_whole = group.post_backward
        group.unshard, group.wait_for_unshard = self.unshard, self.wait_for_unshard
        group.post_backward, group._backward_prefetch = self.post_backward, _do_nothing

    @torch.no_grad()
    def unshard(self, async_op: bool = False) -> None:
        """Begin to gather the group's parameters, each into its own memory; all ranks."""
        if self.group.is_unsharded or self.group._all_gather_result is not None:
            return
        self.group._all_gather_result = _UnderWay()
        for parameter in self.group.fsdp_params:
            parts = [part.detach() for part in parameter.all_gather_inputs]
            kinds = [part.numel() for part in parts], [part.dtype for part in parts]
            parameter.init_all_gather_outputs(*kinds, self.peers.size, self.group.device)
            parameter.alloc_all_gather_outputs()
            for whole, part in zip(parameter.all_gather_outputs, parts, strict=True):
                self._under_way += self.peers.gather(whole.data, part)  # autograd need not know that it changes

    @torch.no_grad()
    def wait_for_unshard(self) -> None:
        """Let modules have the parameters that `unshard` has begun to gather."""
        if self.group._all_gather_result is None:
            return
        for work in self._under_way:
            work.wait()
        for parameter in self.group.fsdp_params:
            parameter.init_unsharded_param()
        self.group._to_unsharded()
        self.group._all_gather_result, self._under_way = None, []

    @torch.no_grad()
    def post_backward(self, *unused: Any) -> None:
        """Replace the group's whole gradients by this process's parts of their mean; all ranks."""
        if not self.group.reduce_grads:
            self._keep_whole()
            return
        self.group._training_state = TrainingState.POST_BACKWARD
        trained = [p for p in self.group.fsdp_params if whole_gradient(p) is not None]
        wholes = [_take_gradient(parameter) for parameter in trained]
        if self.group.reshard_after_backward:
            self.group.reshard()
        if trained:
            self._reduce(trained, wholes)

    def _reduce(self, trained: list[Any], wholes: list[Tensor]) -> None:
        sizes, reduce_dtype = [parameter.sharded_size.numel() for parameter in trained], wholes[0].dtype
        mean = torch.empty(sum(sizes), dtype=trained[0].orig_dtype, device=wholes[0].device)
        for parameter, part in zip(trained, torch.split(mean, sizes), strict=True):
            self.peers.reduce(part, wholes.pop(0), parameter.padded_sharded_param_size.numel())
        self.peers.finish()
        if self.replicas is not None:
            whole = mean.to(reduce_dtype)
            dist.all_reduce(whole, group=self.replicas)
            mean.copy_(whole).div_(self.replicas.size())
        for parameter, part in zip(trained, torch.split(mean, sizes), strict=True):
            _give_gradient(parameter, part.view(parameter.sharded_size))


def _do_nothing() -> None:
    pass


def _take_gradient(parameter: Any) -> Tensor:
    """Of a parameter that has one: its whole gradient [k], which it then has no more."""
    whole: Tensor
    if parameter.unsharded_accumulated_grad is not None:
        whole = parameter.unsharded_accumulated_grad_data
        parameter.unsharded_accumulated_grad = None
    else:
        whole = parameter.unsharded_grad_data
        parameter._unsharded_param.grad = None
    return whole.contiguous().view(-1)


def _give_gradient(parameter: Any, part: Tensor) -> None:
    """Add to what a divided parameter has for a gradient, and tell those who asked to know."""
    divided = parameter.sharded_param
    if divided.grad is None:
        divided.grad = parameter.to_sharded_dtensor(part)
    else:
        divided.grad._local_tensor.add_(part)
    for hook in (divided._post_accumulate_grad_hooks or {}).values():
        hook(divided)


def improve_collectives(groups: Iterable[Any], device: torch.device) -> None:
    """Let the groups of one model do without their backend's collectives, where it has no good ones."""
    peers: Peers | None = None
    for group in groups:
        among: dist.ProcessGroup = group._reduce_scatter_process_group
        if device.type == "cpu" and among.size() > 1 and among._get_backend(device).name() == "gloo":
            peers = peers or Peers(among, device)
            replicated = isinstance(group.mesh_info, DDPMeshInfo)
            DirectGroup(group, peers, group._all_reduce_process_group if replicated else None)
