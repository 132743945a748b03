"""In which order a process takes micro-batches through its stages, forth and back.

The loss is the user's, and is known when the whole forward pass is over. So every schedule first fills the pipeline
with all micro-batches, and later drains it. They differ in what is kept in between.
"""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """One micro-batch in one stage."""

    stage: int
    micro_batch: int


def fill(rank: int, ranks: int, stages: int, micro_batches: int) -> list[Step]:
    """The forward steps of a process, in order. Stage s is on process s modulo `ranks`.

    With several stages each, processes take as many micro-batches as there are processes through their first stage,
    then through the next (Narayanan et al. 2021): the first wait is as short as one stage, not as a process's share.

    >>> fill(1, 2, 4, 3)
    [Step(1, 0), Step(1, 1), Step(3, 0), Step(3, 1), Step(1, 2), Step(3, 2)]
    """
    lots = [range(first, min(first + ranks, micro_batches)) for first in range(0, micro_batches, ranks)]
    return [Step(stage, index) for lot in lots for stage in range(rank, stages, ranks) for index in lot]


def drain(rank: int, ranks: int, stages: int, micro_batches: int) -> list[Step]:
    """The backward steps of a process: those of `fill` from the last to the first."""
    return fill(rank, ranks, stages, micro_batches)[::-1]


def in_flight(rank: int, ranks: int) -> int:
    """Graphs that a process holds at once where each is made again in backward: as 1F1B (Narayanan et al. 2019).

    While it waits for its first gradient, it prepares as many micro-batches as there are stages from it to the end.
    """
    return ranks - rank
