"""A bare `loss.backward()` that some processes wait in and others never come to: an error in place of a hang.

`accelerator.backward` is called on all processes, which then take part whatever their loss depends on. Torch alone
knows of a bare one, and only where it reaches the model.
"""

from __future__ import annotations

import itertools

import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_process_group_store

from accel.errors import PrepareError

_models = itertools.count()


class BarePasses:
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
        """Gradients are about to be used: no more passes; all ranks. Raises PrepareError if others wait in one."""
        waiting = self._say("left", "waits")
        if waiting is not None:
            raise _unmatched(waiting=waiting, missing=self._rank)
        self._forget()
        self._round, self._passes = self._round + 1, 0

    def _say(self, word: str, other: str) -> int | None:
        """Leave a word about the pass to come; returns the rank that left the other word about it, if one did."""
        place = f"{self._round}/{self._passes}"
        self._store.set(f"{place}/{word}", str(self._rank))
        if not self._store.check([f"{place}/{other}"]):
            return None
        return int(self._store.get(f"{place}/{other}"))

    def _forget(self) -> None:
        """Delete the words of the round before, once all processes have exchanged in this one."""
        if self._first and self._passes:
            for word in self._words:
                self._store.delete_key(word)
            self._words = []
        waits = [f"{self._round}/{index}/waits" for index in range(self._passes)]
        self._words += [*waits, f"{self._round}/{self._passes}/left"]


def _unmatched(waiting: int, missing: int) -> PrepareError:
    return PrepareError(
        f"loss.backward(): rank {waiting} waits for rank {missing} in a bare loss.backward(), and rank {missing} went "
        "on without one that reaches the model; call accelerator.backward(loss) on all ranks, whatever it depends on"
    )
