"""Points that all processes come to in the same order: where they part, an error that names both lines.

A call that waits for the other processes waits for ever if one of them never makes it, as a loop that saves or
evaluates on the main process only. So before such a call each process writes down, in a store that all of them see,
which point it has come to, or finds that another has come to another one there.
"""

from __future__ import annotations

import atexit
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_process_group_store

from ..errors import CollectiveError
from ..interfaces.strategy import Strategy
from .exits import fail_at_exit, script_failed
from .lines import users_line
from .world import machine_store

P = ParamSpec("P")
R = TypeVar("R")

FORWARD = "a forward that waits for others"
BARE = "a bare loss.backward(), or torch.autograd.grad"
BACKWARD = "accelerator.backward"
STEP = "a step, or clipping"
END = "the end of the script"
BATCH = "the next batch of a loader, under dispatch_batches: true"
WHOLE = "full_tensor(), or an operator between a divided tensor and a plain one"

KEPT = 1000
"""Points that a store keeps: no process can be further behind another."""


class Points:
    """Those of one group of processes, which come to them together; made by all of them.

    The processes of a machine ask a store of their own, and one of them that of the group: thousands would queue there.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._rank, self._count = dist.get_rank(), 0
        self._stores: list[Store] = []
        self._tidied: list[Store] = []
        """Those in which this process, the first to come there, deletes what is no longer needed."""
        name = f"accel/points/{group.group_name}/{_made[group.group_name]}"
        _made[group.group_name] += 1
        for store in filter(None, (machine_store(), _get_process_group_store(group))):
            self._stores.append(PrefixStore(name, store))
            if not self.claims("first"):
                break
            self._tidied.append(self._stores[-1])

    @classmethod
    def of(cls, group: ProcessGroup) -> Points:
        """The points of these processes, the same for all who wait there; all of them call it."""
        if group.size() == dist.get_world_size():
            group = _everyone()
        if group not in _all:
            _all[group] = cls(group)
        return _all[group]

    def claims(self, what: str) -> bool:
        """Whether this process is the first to claim something, in the last of the stores that it asks."""
        return self._stores[-1].compare_set(what, "", str(self._rank)) == str(self._rank).encode()

    def come_to(self, point: str) -> None:
        """This process is about to wait for the others; raises CollectiveError if one of them has gone elsewhere."""
        index, self._count = self._count, self._count + 1
        mine = (str(self._rank), point, users_line())
        with suppress(dist.DistNetworkError):  # who kept the store has ended: where it is waited for, that is an error
            for store in self._stores:
                found = store.compare_set(str(index), "", "\n".join(mine)).decode().split("\n")
                if found[1] != point:
                    raise _parted(mine, found)
            for store in self._tidied if index >= KEPT else ():
                store.delete_key(str(index - KEPT))


_all: WeakKeyDictionary[ProcessGroup, Points] = WeakKeyDictionary()
_made = Counter[str]()
"""How often there were points of a group of this name."""


def meet(point: str) -> None:
    """Come to a point at which all processes of the run wait for each other, whatever groups they are in; all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        if _everyone() not in _all:
            atexit.unregister(_end)
            atexit.register(_end)  # before the process group is left, since it comes after that in the list
        Points.of(_everyone())
        for points in list(_all.values()):
            points.come_to(point)


def come_to(point: str, strategies: Sequence[Strategy]) -> None:
    """Come to a point at which processes wait for each other along the axes of those strategies that wait."""
    for strategy in strategies:
        if strategy.waits and strategy.mesh.size > 1:
            Points.of(strategy.mesh.group).come_to(point)


def meeting(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a public function that all ranks call, and in which they wait for each other."""
    name = function.__qualname__
    point = f"accelerator.{function.__name__}" if "." in name else f"accel.utils.{name}"

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        meet(point)
        return function(*args, **kwargs)

    return call


def _end() -> None:
    """Let no other process wait for this one, now that its script is over."""
    if script_failed():
        return
    try:
        meet(END)
    except CollectiveError as error:
        fail_at_exit(error, told=not Points.of(_everyone()).claims("telling"))


def _everyone() -> ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _parted(one: Sequence[str], other: Sequence[str]) -> CollectiveError:
    places = [
        f"rank {rank} came to {point}{line and f' at {line}'}"
        for rank, point, line in sorted([one, other], key=lambda place: int(place[0]))
    ]
    advice = "all ranks make such calls, in the same order, and none inside `if accelerator.is_main_process:`"
    if FORWARD in (one[1], other[1]):
        advice = "call the model on all ranks alike, also to evaluate"
    if END in (one[1], other[1]):
        advice = "all ranks make such calls, and as often"
    if BARE in (one[1], other[1]):
        advice = (
            "call accelerator.backward(loss) on all ranks, whatever it depends on, and torch.autograd.grad on all alike"
        )
    return CollectiveError(f"{', and '.join(places)}, where each would wait for the other: {advice}")
