"""Points that all processes come to in the same order: where one waits for others that went elsewhere, an error.

Forward and backward passes gather, exchange and agree. Where a loop calls them on some processes only, as to evaluate
on the main one, those wait for the others, and these for them, at another point: without an error, a hang.
"""

from __future__ import annotations

import itertools

import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_process_group_store

from accel.errors import PrepareError

FORWARD = "a forward that gathers"
BARE = "a bare loss.backward(), or torch.autograd.grad"
BACKWARD = "accelerator.backward"
STEP = "a step, or clipping"
_models = itertools.count()


class Passes:
    """Counts the points of one model. Each process looks in their store for which one another has come to before it.

    A process that finds another point than its own raises, whichever waits, so that the others do not for long.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._store: Store = PrefixStore(f"accel/passes/{next(_models)}", _get_process_group_store(group))
        self._rank, self._first = dist.get_rank(), dist.get_rank(group) == 0
        self._count = self._kept = 0
        self._last = ""

    def come_to(self, point: str) -> None:
        """This process is about to wait for the others at a point; raises PrepareError if they will not come to it."""
        if self._last in (FORWARD, BARE):
            self.forget()  # this process could not have left it before all had met
        found = self._store.compare_set(str(self._count), "", f"{self._rank} {point}").decode()
        self._count, self._last = self._count + 1, point
        rank, _, other = found.partition(" ")
        if other != point:
            raise _unmatched(*sorted([(point, self._rank), (other, int(rank))], key=lambda place: place[0] != BARE))

    def forget(self) -> None:
        """Delete the words about points that all processes have come to, as they have met since."""
        if self._first:
            for index in range(self._kept, self._count):
                self._store.delete_key(str(index))
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
