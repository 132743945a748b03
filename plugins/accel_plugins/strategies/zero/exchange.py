"""Gradients are reduced once per group and backward pass, on every process in the same order.

Torch reduces a group whenever its backward is through: in the order of this process's own graph, as often as the
block was called, and with the gradients that this process happens to have. Where processes differ in what a step
uses, their collectives no longer fit together: a hang, or one block's gradient added to another's. Here a group
waits for its turn, a parameter without a gradient brings zeros, and the processes agree on which parameters nobody
used, whose `.grad` then stays None as in one process.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accel.errors import PrepareError
from accel.runtime.nested import tensors
from accel.runtime.points import BACKWARD, BARE, FORWARD, STEP

from .groups import Groups, make_gradients_alike, whole_gradient
from .reach import Reach, agree_on_used, leaves_none, reach_of, reach_under_way
from .wholes import Wholes
from .zeros import Zeros, drop_empty, fill


@dataclass
class _Turn:
    """One group's part in a backward pass. `calls` are the forward calls that it may be heard from, by `nodes`.

    `filled` are the parameters that brought zeros; with what these became, if they were the first gradient.
    """

    group: Any
    reduce: Callable[[], None]
    calls: int = 0
    heard: int = 0
    done: bool = False
    filled: dict[Any, Zeros | None] = field(default_factory=dict)
    nodes: list[weakref.ref[Any]] = field(default_factory=list)

    def reset(self) -> None:
        self.calls, self.heard, self.done, self.filled, self.nodes = 0, 0, False, {}, []

    def remember(self, inputs: Any) -> None:
        """Note the node through which a forward call will be heard from."""
        for _, tensor in tensors(inputs):
            if getattr(tensor.grad_fn, "param_group", None) is self.group:
                self.nodes.append(weakref.ref(tensor.grad_fn))
                return


class Exchange:
    """Takes over when the groups of one model reduce their gradients.

    `gathers` says whether backward gathers parameters again. A pass of `torch.autograd.grad` leaves no gradients: it
    exchanges none, and what it has gathered stays for the pass through what it computed, as a gradient penalty needs.
    """

    def __init__(self, groups: Groups, wholes: Wholes, find_unused: bool, gathers: bool) -> None:
        self.groups, self.wholes, self.find_unused, self.gathers = groups, wholes, find_unused, gathers
        self.group = wholes.group
        blocks = groups.all[len(groups.rest) :]
        self._turns = [_Turn(g, g.post_backward) for g in (*reversed(blocks), *groups.rest)]
        self._reach: Reach | None = None
        self._ran = self._begun = self._bare = False
        self._leaves_none = self._without_gradients = self._kept = self._reshards_late = False
        for turn in self._turns:
            self._listen(turn)
        for state in groups.states:
            self._finish_with(state)

    def begin(self, loss: Tensor, exchange: bool, reshard: bool, met: bool) -> None:
        """Say what the backward pass from `loss` does with gradients, and with gathered parameters; all ranks.

        Where processes will not ask for the same parameters, all are gathered now. `met` says whether all processes are
        known to run this pass.
        """
        self._ran, self._begun = False, True
        looks = self.find_unused and (exchange or self.gathers)
        if not met and (looks or self.wholes.made):
            self.wholes.points.come_to(BACKWARD)
        self.wholes.begin(loss)
        if looks:
            self._reach = reach_of(loss, self.groups, [turn.calls for turn in self._in_order], self.group)
            reshard = reshard and not self._gather_if_unlike(self._reach)
        self._start(exchange, reshard)

    def end(self, alone: bool) -> None:
        """After a backward pass: take part in the exchange even if it did not reach this process's model.

        `alone` says whether it is the only model; asked where the processes did not look at the graph.
        """
        due = self._reach.anywhere if self._reach is not None else alone
        if self._exchanges and not self._ran and (due or self._has_gradients()):
            self.groups.root._root_post_backward_final_callback()
        self._finish()
        self.wholes.end()
        self.groups.hide()

    def begin_forward(self, groups: Iterable[Any]) -> None:
        """A forward is about to gather what is not whole of these groups."""
        if not all(map(self.groups.is_whole, groups)):
            self.wholes.points.come_to(FORWARD)

    def end_passes(self) -> None:
        """Make sure that no process waits for this one in a bare `loss.backward()`; all ranks."""
        self.wholes.points.come_to(STEP)

    def _begin_bare(self) -> None:
        """A bare `loss.backward()` is about to wait: see to it that all processes ask for the same; all ranks."""
        self._begun = self._bare = True
        self.wholes.points.come_to(BARE)
        self.wholes.arrive()
        if not ((self.gathers or self.wholes.in_pass) and self.find_unused):
            self._start(exchange=True, reshard=True)
            return
        nodes = [[node for node in (ref() for ref in turn.nodes) if node is not None] for turn in self._in_order]
        calls = [turn.calls for turn in self._in_order]
        self._reach = reach_under_way(nodes, self.groups, calls, self.group)
        self._start(exchange=True, reshard=not self._gather_if_unlike(self._reach))

    def _begin_without_gradients(self) -> None:
        """`torch.autograd.grad` is about to wait for the others, where it gathers."""
        if self.gathers and not self._without_gradients:
            self.wholes.points.come_to(BARE)
            self.wholes.arrive()
        if torch.is_grad_enabled():  # as with create_graph=True
            self.groups.keep(True)
        self._without_gradients = True

    def _gather_if_unlike(self, reach: Reach) -> bool:
        if self.wholes.in_pass and not reach.alike:
            raise PrepareError(
                "backward: the processes use different parts of the model, and their losses results of full_tensor() "
                "or of operators between divided parameters and plain tensors; let all use the same parts, or compute "
                "with the parameters in a method, which the setting `methods` names"
            )
        unlike = self.gathers and reach.anywhere and not reach.alike
        if unlike:
            self.groups.gather()
        return unlike

    def _start(self, exchange: bool, reshard: bool) -> None:
        """What `torch.autograd.grad` left gathered is freed at the end: torch gathers none for a second derivative."""
        self.groups.keep(False)
        self._reshards_late = reshard and self._kept
        self._set(exchange, reshard and not self._kept)
        self._kept = False

    def _finish(self) -> None:
        """Forget what was known of a backward pass, and be ready for a bare one."""
        if self._reshards_late or (self._reach is not None and not self._reach.alike):
            self.groups.reshard()
        self._reach, self._begun, self._reshards_late = None, False, False
        self._set(exchange=True, reshard=True)

    def run(self) -> None:
        """Exchange the gradients that passes have added up, without a backward pass; all ranks."""
        self._set(exchange=True, reshard=True)
        self.groups.root._root_post_backward_final_callback()
        self.groups.hide()

    def _set(self, exchange: bool, reshard: bool) -> None:
        for group in self.groups.all:
            group.reduce_grads = group.all_reduce_grads = exchange
            group.reshard_after_backward = reshard

    def _listen(self, turn: _Turn) -> None:
        group, register = turn.group, turn.group._register_post_backward_hook

        def count(args: Any, kwargs: Any) -> Any:
            turn.calls += torch.is_grad_enabled()
            inputs = register(args, kwargs)
            turn.remember(inputs)
            return inputs

        def heard(*unused: Any) -> None:
            if self._leaves_none or (not self._begun and leaves_none(self.groups)):
                return  # a second derivative may come here before it comes to `arrive`
            turn.heard += 1
            if not group.reduce_grads:
                turn.reduce()
            else:
                self._take_turns()

        def arrive(*args: Any) -> None:
            self._leaves_none = group.reduce_grads and leaves_none(self.groups)
            if self._leaves_none:
                self._begin_without_gradients()
                prepare(*args)
                return
            if not self._begun:
                self._begin_bare()
            prepare(*args)

        prepare = group.pre_backward
        group._register_post_backward_hook = count
        group.pre_backward = arrive
        group.post_backward = heard

    def _finish_with(self, state: Any) -> None:
        finish = state._root_post_backward_final_callback

        def flush() -> None:
            if self._leaves_none:
                self._leaves_none, self._without_gradients, self._kept = False, False, True
                self.groups.rest_gathered()
                return
            self._ran = True
            if self._exchanges:
                for turn in self._turns:
                    self._reduce(turn)
            finish()
            if self._exchanges and self.find_unused:
                self._drop_unused()
            for turn in self._turns:
                turn.reset()
            if self._bare:
                self._bare = False
                self._finish()

        state._root_post_backward_final_callback = flush

    @property
    def _in_order(self) -> list[_Turn]:
        """The turns in the order of the groups."""
        turns = {id(turn.group): turn for turn in self._turns}
        return [turns[id(group)] for group in self.groups.all]

    @property
    def _exchanges(self) -> bool:
        return all(turn.group.reduce_grads for turn in self._turns)

    def _take_turns(self) -> None:
        """Reduce the groups whose backward is through, up to the first that is still to come."""
        for turn in self._turns:
            if not turn.done and turn.heard < max(turn.calls, 1):
                return
            self._reduce(turn)

    def _reduce(self, turn: _Turn) -> None:
        if turn.done:
            return
        turn.done = True
        drop_empty(turn.group)
        filled = [p for p in turn.group.fsdp_params if fill(p)] if self.find_unused else []
        first = [p for p in filled if p.sharded_param.grad is None]
        make_gradients_alike(turn.group)
        turn.reduce()
        turn.filled = {**dict.fromkeys(filled), **{p: Zeros(p) for p in first}}

    def _drop_unused(self) -> None:
        """Take back the zeros of parameters that no process used; all ranks."""
        filled = {p: zeros for turn in self._turns for p, zeros in turn.filled.items()}
        parameters = list(self.groups.parameters())
        if self._reach is not None:
            used = self._reach.used
        else:
            used = agree_on_used([parameter not in filled for parameter in parameters], self.group)
        for parameter, anywhere in zip(parameters, used, strict=True):
            zeros = filled.get(parameter)
            if not anywhere and zeros is not None and zeros.untouched:
                parameter.sharded_param.grad = None

    def _has_gradients(self) -> bool:
        return any(whole_gradient(parameter) is not None for parameter in self.groups.parameters())
