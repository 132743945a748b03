"""What processes tell one another arrives, however long it is on which of them."""

from __future__ import annotations

from accel import Accelerator
from accel.runtime.checkpoint.exchange import SHORT, Exchange
from accel.testing import run

LENGTHS = [(0, 0, 0), (1, 5, 0), (SHORT, 0, SHORT - 50), (0, 3 * SHORT, 1), (SHORT + 1, 40 * SHORT, 17 * SHORT)]
"""Of messages, by rank."""


def tell() -> None:
    accelerator = Accelerator(strategies=["ddp"])
    exchange = Exchange(accelerator.world, 60)
    exchange.connect()
    for lengths in LENGTHS:
        sent = [bytes([rank + 1]) * length for rank, length in enumerate(lengths)]
        assert exchange.gather(sent[accelerator.process_index]) == sent
    accelerator.end_training()


def test_messages_of_any_length() -> None:
    run(3, tell)
