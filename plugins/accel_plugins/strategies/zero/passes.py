"""Points that all processes come to in the same order: where one waits for others that went elsewhere, an error.

Forward and backward passes gather, exchange and agree. Where a loop calls them on some processes only, as to evaluate
on the main one, those wait for the others, and these for them, at another point: without an error, a hang.
"""

from __future__ import annotations

import itertools
from contextlib import suppress

import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_process_group_store

from accel.errors import PrepareError
from accel.runtime.world import machine_store

FORWARD = "a forward that gathers"
BARE = "a bare loss.backward(), or torch.autograd.grad"
BACKWARD = "accelerator.backward"
STEP = "a step, or clipping"
_models = itertools.count()


class Passes:
    """Counts the points of one model. Each process looks in a store for which one another has come to before it.

    A process that finds another point than its own raises, whichever waits, so that the others do not for long. The
    processes of a machine ask a store of their own, and one of them that of all: thousands would queue there.
    """

    def __init__(self, group: ProcessGroup) -> None:
        name, ranks = f"accel/passes/{next(_models)}", dist.get_process_group_ranks(group)
        self._rank = dist.get_rank()
        self._stores: list[Store] = []
        self._tidied: list[Store] = []
        """Those in which this process, the first to come there, deletes what is no longer needed."""
        for store in (machine_store(), _get_process_group_store(group)):
            self._stores.append(PrefixStore(f"{name}/{ranks[0]}", store))
            if self._stores[-1].compare_set("first", "", str(self._rank)) != str(self._rank).encode():
                break
            self._tidied.append(self._stores[-1])
        self._count = self._kept = 0
        self._last = ""

    def come_to(self, point: str) -> None:
        """This process is about to wait for the others at a point; raises PrepareError if they will not come to it."""
        if self._last in (FORWARD, BARE):
            self.forget()  # this process could not have left it before all had met
        index, self._count, self._last = str(self._count), self._count + 1, point
        with suppress(dist.DistNetworkError):  # who kept the store has ended: where it is waited for, that is an error
            for store in self._stores:
                rank, _, other = store.compare_set(index, "", f"{self._rank} {point}").decode().partition(" ")
                if other != point:
                    places = [(point, self._rank), (other, int(rank))]
                    raise _unmatched(*sorted(places, key=lambda place: place[0] != BARE))

    def forget(self) -> None:
        """Delete the words about points that all processes have come to, as they have met since."""
        with suppress(dist.DistNetworkError):
            for index, store in itertools.product(range(self._kept, self._count), self._tidied):
                store.delete_key(str(index))
        self._kept = self._count


def _unmatched(one: tuple[str, int], other: tuple[str, int]) -> PrepareError:
    (point, waiting), (elsewhere, missing) = one, other
    advice = "call the model on all ranks alike, also to evaluate"
    if BARE in (point, elsewhere):
        advice = (
            "call accelerator.backward(loss) on all ranks, whatever it depends on, and torch.autograd.grad on all alike"
        )
    return PrepareError(
        f"rank {waiting} waits for rank {missing} in {point}, and rank {missing} went on to {elsewhere}; {advice}"
    )
