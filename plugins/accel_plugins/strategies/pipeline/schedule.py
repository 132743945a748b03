"""In which order a process takes micro-batches through its stages, forth and back.

The loss is the user's, and is known when the whole forward pass is over. So every schedule first fills the pipeline
with all micro-batches, and later drains it. They differ in what is kept in between, in the stages of a process, and
in what a process computes before it passes a gradient on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Step(NamedTuple):
    """One micro-batch in one stage."""

    stage: int
    micro_batch: int


def fill(rank: int, ranks: int, stages: int, micro_batches: int) -> list[Step]:
    """The forward steps of a process, in order. Stage s is on process s modulo `ranks`.

    With several stages each, all micro-batches go through a process's first stage, then all through the next
    (breadth-first, Lamy-Poirier 2023). The first wait is one stage long, as where processes take turns in groups of
    as many micro-batches as there are processes (Narayanan et al. 2021); but what comes back to a process has had the
    time of `micro_batches - ranks` steps to get there, so that no later step waits for a message under way.

    >>> fill(1, 2, 4, 3)
    [Step(1, 0), Step(1, 1), Step(1, 2), Step(3, 0), Step(3, 1), Step(3, 2)]
    """
    return [Step(stage, index) for stage in range(rank, stages, ranks) for index in range(micro_batches)]


def drain(rank: int, ranks: int, stages: int, micro_batches: int) -> list[Step]:
    """The backward steps of a process: those of `fill` from the last to the first."""
    return fill(rank, ranks, stages, micro_batches)[::-1]


def weights_waiting(rank: int) -> int:
    """Steps whose gradients of weights a process puts off for those that the stage before waits for (Qi et al. 2023).

    Each process is so one step ahead of the one before it, which then finds its next gradient there.
    """
    return rank


def in_flight(rank: int, ranks: int) -> int:
    """Graphs that a process holds at once where activations are computed again: as 1F1B (Narayanan et al. 2019).

    While it waits for its first gradient, it has as many micro-batches ready as there are stages from it to the end.
    """
    return ranks - rank


def computed_again(steps: Sequence[Step], rank: int, ranks: int) -> frozenset[Step]:
    """The forward steps, of all in order, whose activations are dropped; backward begins with the others.

    >>> sorted(step.micro_batch for step in computed_again(fill(0, 2, 2, 5), 0, 2))
    [0, 1, 2]
    """
    return frozenset(steps[: max(len(steps) - in_flight(rank, ranks), 0)])
