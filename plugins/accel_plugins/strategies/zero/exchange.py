"""Gradients are reduced once per group and backward pass, on every process in the same order.

Torch reduces a group whenever its backward is through: in the order of this process's own graph, as often as the
block was called, and with the gradients that this process happens to have. Where processes differ in what a step
uses, their collectives no longer fit together: a hang, or one block's gradient added to another's. Here a group
waits for its turn, a parameter without a gradient brings zeros, and the processes agree on which parameters nobody
used, whose `.grad` then stays None as in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from .groups import Groups


@dataclass
class _Turn:
    """One group's part in a backward pass. `calls` are the forward calls that it will be heard from."""

    group: Any
    reduce: Callable[[], None]
    calls: int = 0
    heard: int = 0
    done: bool = False
    filled: list[Any] = field(default_factory=list)


class Exchange:
    """Takes over when the groups of one model reduce their gradients."""

    def __init__(self, groups: Groups, group: ProcessGroup, find_unused: bool) -> None:
        self.groups, self.group, self.find_unused = groups, group, find_unused
        blocks = groups.all[len(groups.rest) :]
        self._turns = [_Turn(g, g.post_backward) for g in (*reversed(blocks), *groups.rest)]
        self._ran = False
        for turn in self._turns:
            self._listen(turn)
        for state in groups.states:
            self._finish_with(state)

    def begin(self, exchange: bool, reshard: bool) -> None:
        """Say what the coming backward pass does with gradients, and with gathered parameters."""
        self._ran = False
        for group in self.groups.all:
            group.reduce_grads = group.all_reduce_grads = exchange
            group.reshard_after_backward = reshard

    def end(self, alone: bool) -> None:
        """After a backward pass: take part in the exchange even if it did not reach this process's model."""
        if not self._ran and (alone or self._has_gradients()):
            self.groups.root._root_post_backward_final_callback()
        self.groups.hide()
        self.begin(exchange=True, reshard=True)  # for a bare loss.backward()

    def _listen(self, turn: _Turn) -> None:
        group, register = turn.group, turn.group._register_post_backward_hook

        def count(args: Any, kwargs: Any) -> Any:
            result = register(args, kwargs)
            turn.calls += result[0] is not args or result[1] is not kwargs
            return result

        def heard(*unused: Any) -> None:
            turn.heard += 1
            if not group.reduce_grads:
                turn.reduce()
            else:
                self._take_turns()

        group._register_post_backward_hook = count
        group.post_backward = heard

    def _finish_with(self, state: Any) -> None:
        finish = state._root_post_backward_final_callback

        def flush() -> None:
            self._ran = True
            if self._exchanges:
                for turn in self._turns:
                    self._reduce(turn)
            finish()
            if self._exchanges:
                self._drop_unused()
            for turn in self._turns:
                turn.calls, turn.heard, turn.done, turn.filled = 0, 0, False, []

        state._root_post_backward_final_callback = flush

    @property
    def _exchanges(self) -> bool:
        return all(turn.group.reduce_grads for turn in self._turns)

    def _take_turns(self) -> None:
        """Reduce the groups whose backward is through, up to the first that is still to come."""
        for turn in self._turns:
            if turn.done:
                continue
            if not turn.heard or turn.heard < turn.calls:
                return
            self._reduce(turn)

    def _reduce(self, turn: _Turn) -> None:
        if turn.done:
            return
        turn.done = True
        if self.find_unused:
            turn.filled = [(p, p.sharded_param.grad is not None) for p in turn.group.fsdp_params if _fill(p)]
        turn.reduce()

    def _drop_unused(self) -> None:
        """Take back the zeros of parameters that no process used; all ranks."""
        if not self.find_unused:
            return
        filled = {id(p): had for turn in self._turns for p, had in turn.filled}
        trained = [p for p in self.groups.parameters() if p.sharded_param.requires_grad]
        if not trained:
            return
        used = torch.tensor([id(p) not in filled for p in trained], dtype=torch.int32, device=trained[0].device)
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self.group)
        if not filled:
            return
        for parameter, anywhere in zip(trained, used.tolist(), strict=True):
            if not anywhere and not filled[id(parameter)]:
                parameter.sharded_param.grad = None

    def _has_gradients(self) -> bool:
        return any(_whole_gradient(parameter) is not None for parameter in self.groups.parameters())


def _whole_gradient(parameter: Any) -> Any:
    """The gradient that this process has accumulated and not yet exchanged; None if there is none."""
    if parameter.unsharded_accumulated_grad is not None:
        return parameter.unsharded_accumulated_grad
    return parameter._unsharded_param.grad if hasattr(parameter, "_unsharded_param") else None


def _fill(parameter: Any) -> bool:
    """Give zeros to a parameter that trains and has no gradient on this process; returns whether it did."""
    if not parameter.sharded_param.requires_grad or _whole_gradient(parameter) is not None:
        return False
    if not hasattr(parameter, "_unsharded_param"):
        return False
    parameter._unsharded_param.grad = torch.zeros_like(parameter._unsharded_param)
    return True
