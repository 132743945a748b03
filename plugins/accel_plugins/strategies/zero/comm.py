"""Parameters and gradients go from process to process, from where they lie to where they are needed.

Torch packs a group's parameters into one buffer, has the backend gather that, and copies out again; so it does with
gradients. gloo packs once more underneath, and its reduce-scatter is an all-reduce. In main memory these copies, and
the system filling fresh pages with zeros, cost more than the sending itself.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_common import DDPMeshInfo, TrainingState

from accel.errors import PrepareError
from accel.runtime.handling import gradient_hooks

from .groups import whole_gradient
from .memory import LINE_BYTES, GatheredMemory, Spare

_LOT_BYTES = 8 << 20
"""What is received at once, before it is added up; this memory is kept. Less makes more processes wait more often."""

_SUM_BYTES = 1 << 18
"""What is added up at once: stays in a core's cache until it is divided."""

_SMALL_BYTES = 1 << 16
"""Less than this goes together: it takes less time to copy than to send by itself."""


@dataclass(frozen=True)
class Message:
    """What to send to a process, and where to receive what it sends. `small` is the same on both."""

    rank: int
    sent: Tensor
    received: Tensor
    small: bool


class Messages:
    """Messages to and from the processes of `group`, begun; between two processes they arrive in order.

    What a peer waits for, gloo sends in this thread and under a lock. Its own thread would spin at the lock if
    something came in meanwhile, so nothing is asked for before.
    """

    def __init__(self, group: dist.ProcessGroup, messages: Sequence[Message]) -> None:
        self._packed: list[tuple[list[Tensor], Tensor]] = []
        begun = [message for message in messages if not message.small]
        for rank in sorted({message.rank for message in messages if message.small}):
            begun.append(self._pack(rank, [message for message in messages if message.small and message.rank == rank]))
        self._works = [group.send([message.sent], message.rank, 0) for message in begun if message.sent.numel()]
        self._works += [group.recv([m.received], m.rank, 0) for m in begun if m.received.numel()]

    def _pack(self, rank: int, messages: Sequence[Message]) -> Message:
        places = [message.received.view(torch.uint8) for message in messages]
        received = places[0].new_empty(sum(place.nbytes for place in places))
        self._packed.append((places, received))
        sent = torch.cat([message.sent.view(torch.uint8) for message in messages])
        return Message(rank, sent, received, small=False)

    def wait(self) -> None:
        """Wait until all is sent and received."""
        for work in reversed(self._works):  # so that this thread is woken once for what arrives in order
            work.wait()
        for places, received in self._packed:
            parts = torch.split_with_sizes(received, [place.nbytes for place in places])
            for place, part in zip(places, parts, strict=True):
                place.copy_(part)


class Peers:
    """The processes that a model is divided among, as one of them sees them."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.others = [rank for rank in range(self.size) if rank != self.rank]
        self.scratch = torch.empty(_LOT_BYTES, dtype=torch.uint8, device=device)
        self._messages: list[Message] = []
        self._received: deque[tuple[Tensor, list[Tensor]]] = deque()
        self._used = 0

    def gather(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Messages:
        """Begin to gather of each pair what processes have of the second [n] into the first [processes * n]."""
        rows = [(whole.view(self.size, -1), part, part.nbytes < _SMALL_BYTES) for whole, part in pairs]
        messages = Messages(
            self.group,
            [Message(rank, part, whole[rank], small) for whole, part, small in rows for rank in self.others],
        )
        for whole, part, _ in rows:
            if whole[self.rank].data_ptr() != part.data_ptr():
                whole[self.rank].copy_(part)
        return messages

    def finish(self) -> None:
        """Send, receive and average all that `reduce` was given."""
        Messages(self.group, self._messages).wait()
        self._messages, self._used = [], 0
        while self._received:
            _average(*self._received.popleft())  # which lets go of the whole, if this was the last lot of it

    def reduce(self, output: Tensor, whole: Tensor, length: int) -> None:
        """Let `finish` average this process's part of `whole` [k] into `output`.

        Parts are of `length`, the last of less. The sum is taken in the order of the ranks, so that it does not depend
        on timing.
        """
        starts = range(0, self.size * length, length)
        parts = [whole[start : start + length] for start in starts]
        lines = _LOT_BYTES // LINE_BYTES // len(self.others)
        lot = max(lines, 1) * LINE_BYTES // whole.element_size()
        for start in range(0, length, lot):
            size = min(lot, length - start) * whole.element_size()
            self._reduce_lot(output[start : start + lot], [part[start : start + lot] for part in parts], size)

    def _reduce_lot(self, output: Tensor, parts: list[Tensor], size: int) -> None:
        """The same for parts of at most `size` bytes: by that, all processes decide alike what goes together."""
        own, small = parts[self.rank], size < _SMALL_BYTES
        room = -(-size // LINE_BYTES) * LINE_BYTES
        if self._used + room * len(self.others) > _LOT_BYTES:
            self.finish()
        for rank in self.others:
            received = self.scratch[self._used : self._used + own.nbytes].view(own.dtype)
            self._used += room
            self._messages.append(Message(rank, parts[rank], received, small))
            parts[rank] = received
        self._received.append((output, parts))


def _average(output: Tensor, parts: list[Tensor]) -> None:
    """The mean of `parts`, each [n], computed in the type of `output` [n]."""
    if output.nbytes <= _SUM_BYTES:
        _average_at_once(output, *parts)
        return
    step = _SUM_BYTES // output.element_size()
    for pieces in zip(*(torch.split(tensor, step) for tensor in (output, *parts)), strict=True):
        _average_at_once(*pieces)


def _average_at_once(total: Tensor, first: Tensor, second: Tensor, *rest: Tensor) -> None:
    if first.dtype == total.dtype:
        torch.add(first, second, out=total)
    else:
        total.copy_(first).add_(second)
    for part in rest:
        total.add_(part)
    total.div_(2 + len(rest))


class _UnderWay:
    """What torch looks at to know that a group is being gathered."""

    all_gather_event = all_gather_work = None


class DirectGroup:
    """Gathers and reduces one of torch's parameter groups by way of `peers`.

    Nothing is gathered ahead, unless asked for: it takes the memory of another block. With `spare`, memory is taken
    from there and given back to it; without, it stays and holds this process's parts.
    """

    def __init__(self, group: Any, peers: Peers, replicas: dist.ProcessGroup | None, spare: Spare | None) -> None:
        self.group, self.peers, self.replicas, self.spare = group, peers, replicas, spare
        self._under_way: Messages | None = None
        self._memory = None if spare else self._make_memory()  # now, before anybody looks at the parts
        self._keep_whole = group.post_backward
        group.unshard, group.wait_for_unshard = self.unshard, self.wait_for_unshard
        group.post_backward, group._backward_prefetch = self.post_backward, _do_nothing

    @torch.no_grad()
    def _make_memory(self) -> GatheredMemory:
        peers = self.peers
        return GatheredMemory(self.group.fsdp_params, peers.size, peers.rank, self.group.device, self.spare)

    @torch.no_grad()
    def unshard(self, async_op: bool = False) -> None:
        """Begin to gather the group's parameters, each to where it is used; all ranks."""
        if self.group.is_unsharded or self.group._all_gather_result is not None:
            return
        self.group._all_gather_result = _UnderWay()
        self._memory = self._memory or self._make_memory()
        self._memory.allocate()
        outputs = [output for parameter in self.group.fsdp_params for output in parameter.all_gather_outputs]
        inputs = [part.detach() for parameter in self.group.fsdp_params for part in parameter.all_gather_inputs]
        self._under_way = self.peers.gather(list(zip(outputs, inputs, strict=True)))

    @torch.no_grad()
    def wait_for_unshard(self) -> None:
        """Let modules have the parameters that `unshard` has begun to gather."""
        if self._under_way is None:
            return
        self._under_way.wait()
        self.group._to_unsharded()
        self.group._all_gather_result = self._under_way = None

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
    """Add to what a divided parameter has for a gradient; those who asked to know may replace it, or are told."""
    divided = parameter.sharded_param
    gradient = parameter.to_sharded_dtensor(part)
    for hook in gradient_hooks(divided):
        replaced = hook(gradient)
        gradient = gradient if replaced is None else replaced
    if divided.grad is None:
        divided.grad = gradient
    else:
        divided.grad._local_tensor.add_(gradient._local_tensor)
    for hook in (divided._post_accumulate_grad_hooks or {}).values():
        hook(divided)


def improve_collectives(groups: Iterable[Any], device: torch.device, spare: Spare | None) -> None:
    """Let the groups of one model do without their backend's collectives, where it has no good ones.

    `spare` is where memory for gathered parameters goes when a group is divided again; without one, it stays.
    """
    peers: Peers | None = None
    for group in groups:
        among: dist.ProcessGroup = group._reduce_scatter_process_group
        own_way = any(hasattr(p._sharded_local_tensor, "fsdp_pre_all_gather") for p in group.fsdp_params)
        gloo = device.type == "cpu" and among.size() > 1 and among._get_backend(device).name() == "gloo"
        if gloo and not own_way:
            peers = peers or Peers(among, device)
            replicated = isinstance(group.mesh_info, DDPMeshInfo)
            DirectGroup(group, peers, group._all_reduce_process_group if replicated else None, spare)
        else:
            group.post_backward = functools.partial(_refuse_hooks, group, group.post_backward)


def _refuse_hooks(group: Any, reduce: Any, *args: Any) -> None:
    """Torch's own exchange does not come past those who asked to be called with a gradient."""
    for parameter in group.fsdp_params:
        if gradient_hooks(parameter.sharded_param):
            raise PrepareError(
                f"backward: register_hook() on the divided parameter {parameter._param_fqn!r} would not be called; "
                "change its .grad after the backward pass"
            )
    reduce(*args)
