"""A bare `loss.backward()`, or `torch.autograd.grad`, that some processes wait in and others never come to: an error.

`accelerator.backward` is called on all processes, which then take part whatever their loss depends on. Torch alone
knows of the others, and only where they reach the model. Without an error they hang.
"""

from __future__ import annotations

import itertools

import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_process_group_store

from accel.errors import PrepareError

_models = itertools.count()


class Passes:
    """Counts the bare passes of one model between the points where all processes must have come to equally many.

    A process that is about to wait in a pass says so in the processes' store, and one that comes to such a point says
    which pass it has not seen. Each then looks for the word of the other, so that whoever is later finds it.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._store: Store = PrefixStore(f"accel/bare/{next(_models)}", _get_process_group_store(group))
        self._rank, self._first = dist.get_rank(), dist.get_rank(group) == 0
        self._round = self._passes = 0
        self._words: list[str] = []

    def begin(self) -> None:
        """A pass is about to wait for the others; raises PrepareError if one will not come to it."""
        missing = self._say("waits", "left")
        if missing is not None:
            raise _unmatched(waiting=self._rank, missing=missing)
        self._passes += 1

    def end_round(self) -> None:
        """No more passes, as a window or its exchange ends; all ranks. Raises PrepareError if others wait in one."""
        waiting = self._say("left", "waits")
        if waiting is not None:
            raise _unmatched(waiting=waiting, missing=self._rank)
        if self._passes:
            self.forget()  # all processes have met in this round
        waits = [f"{self._round}/{index}/waits" for index in range(self._passes)]
        self._words += [*waits, f"{self._round}/{self._passes}/left"]
        self._round, self._passes = self._round + 1, 0

    def forget(self) -> None:
        """Delete the words of the rounds before, once all processes have met after them."""
        if self._first:
            for word in self._words:
                self._store.delete_key(word)
        self._words = []

    def _say(self, word: str, other: str) -> int | None:
        """Leave a word about the pass to come; returns the rank that left the other word about it, if one did."""
        place = f"{self._round}/{self._passes}"
        self._store.set(f"{place}/{word}", str(self._rank))
        if not self._store.check([f"{place}/{other}"]):
            return None
        return int(self._store.get(f"{place}/{other}"))


def _unmatched(waiting: int, missing: int) -> PrepareError:
    return PrepareError(
        f"loss.backward(): rank {waiting} waits for rank {missing} in a bare loss.backward(), or torch.autograd.grad, "
        f"and rank {missing} went on without one that reaches the model; call accelerator.backward(loss) on all ranks, "
        "whatever it depends on, and torch.autograd.grad on all alike"
    )
