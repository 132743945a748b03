"""Who checks what before a load: every machine all that goes into memory in use there, each process a share."""

from __future__ import annotations

import random
from pathlib import Path

from accel.runtime.checkpoint.read import Parts
from accel.storage import LATER, NOW, Range

RANGES = [Range(offset, 10, file="f") for offset in range(0, 600, 10)]


def test_checks_are_shared_by_machine() -> None:
    """Three machines of two, three and one processes, whose ranks want anything in any way."""
    draw = random.Random(0)
    machines = [0, 0, 2, 2, 2, 5]
    parts = Parts(Path("nowhere"), RANGES)
    marks = [bytes(draw.choice((0, 0, 0, 0, NOW, LATER)) for _ in RANGES) for _ in machines]
    parts._asked = list(zip(machines, marks, strict=True))
    shares = [parts._checks_of(rank) for rank in range(len(machines))]
    unwanted = {i for i in range(len(RANGES)) if not any(mark[i] for mark in marks)}
    assert unwanted
    for machine in set(machines):
        here = [rank for rank, of in enumerate(machines) if of == machine]
        later = {i for i in range(len(RANGES)) if any(marks[rank][i] == LATER for rank in here)}
        found = [i for rank in here for i in shares[rank] if i not in unwanted]
        assert sorted(found) == sorted(later)
        assert max(len(shares[rank]) for rank in here) <= len(later) // len(here) + len(unwanted) // len(machines) + 2
    assert sorted(i for share in shares for i in share if i in unwanted) == sorted(unwanted)
