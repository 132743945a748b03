"""What a backward pass will reach, read from its graph before it runs, and whether all processes agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.distributed import ProcessGroup

from accel.runtime.graph import nodes_of

from .groups import Groups, whole_gradient

_will_execute: Callable[[Any], bool] = torch._C._will_engine_execute_node
"""Whether the backward pass under way comes to a node."""


@dataclass(frozen=True)
class Reach:
    """What the processes together will do. `used` tells for each parameter whether any has a gradient for it."""

    anywhere: bool
    alike: bool
    used: list[bool]


def reach_of(loss: Tensor | None, groups: Groups, calls: list[int], group: ProcessGroup) -> Reach:
    """Find out what the backward pass from `loss`, if there is one, reaches on each process; all ranks.

    `calls` are the forward calls of each group. The processes are alike if their backward passes will ask for the
    same groups equally often: only then do their collectives fit together by themselves.
    """
    heard = [0] * len(groups.all)
    used = set[int]()
    leaves = {id(p._unsharded_param): p for p in groups.parameters() if hasattr(p, "_unsharded_param")}
    places = {id(g): place for place, g in enumerate(groups.all)}
    for node in () if loss is None else nodes_of(loss):
        if (place := places.get(id(getattr(node, "param_group", None)))) is not None:
            heard[place] += 1
        elif (parameter := leaves.get(id(getattr(node, "variable", None)))) is not None:
            used.add(id(parameter))
    return _compare(heard, calls, used, groups, group)


def reach_under_way(nodes: Sequence[Sequence[Any]], groups: Groups, calls: list[int], group: ProcessGroup) -> Reach:
    """The same from within a backward pass whose loss is not known; all ranks.

    `nodes` are those of each group's forward calls that tell it that its backward is through.
    """
    heard = [sum(map(_will_execute, own)) for own in nodes]
    used = {id(parameter) for parameter, leaf in _leaves(groups) if _will_execute(get_gradient_edge(leaf).node)}
    return _compare(heard, calls, used, groups, group)


def leaves_none(groups: Groups) -> bool:
    """Whether the backward pass under way gives no parameter a gradient though some train, as `torch.autograd.grad`."""
    none_trains = True
    for _, leaf in _leaves(groups):
        none_trains = False
        if _will_execute(get_gradient_edge(leaf).node):
            return False
    return not none_trains


def _leaves(groups: Groups) -> Iterator[tuple[Any, Tensor]]:
    """The gathered parameters that train, beside torch's record of each."""
    for parameter in groups.parameters():
        leaf = getattr(parameter, "_unsharded_param", None)
        if leaf is not None and leaf.requires_grad:
            yield parameter, leaf


def _compare(heard: list[int], calls: list[int], used: set[int], groups: Groups, group: ProcessGroup) -> Reach:
    used = used | {id(p) for p in groups.parameters() if whole_gradient(p) is not None}
    bits = [int(id(p) in used) for p in groups.parameters()]
    touched = [int(any(id(p) in used for p in g.fsdp_params)) for g in groups.all]
    return _agree([*heard, *calls, *touched], bits, bool(used) or any(heard), group)


def agree_on_used(used: list[bool], group: ProcessGroup) -> list[bool]:
    """For each parameter, whether any process used it; all ranks."""
    return _agree([], [int(bit) for bit in used], True, group).used


def _agree(facts: list[int], bits: list[int], reached: bool, group: ProcessGroup) -> Reach:
    brought = torch.tensor([int(reached), *bits, *facts, *(-fact for fact in facts)], dtype=torch.int32)
    dist.all_reduce(brought, op=dist.ReduceOp.MAX, group=group)  # on the CPU, so that no device has to be waited for
    found = brought.tolist()
    largest = found[1 + len(bits) :]
    alike = all(a == -b for a, b in zip(largest[: len(facts)], largest[len(facts) :], strict=True))
    return Reach(anywhere=bool(found[0]), alike=alike, used=[bool(bit) for bit in found[1 : 1 + len(bits)]])
