"""Memory that the collectives of ZeRO use again, and the order in which torch asks for it."""

from __future__ import annotations

import pytest
import torch
from accel_plugins.strategies.zero.comm import _LOT_BYTES, AllToAllReduceScatter, Scratch

CPU = torch.device("cpu")


def place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_memory_is_used_again() -> None:
    scratch = Scratch()
    first = scratch.take(100, torch.float32, CPU)
    where = place(first)
    del first
    again = scratch.take(40, torch.float64, CPU)
    assert place(again) == where and again.shape == (40,) and again.dtype == torch.float64


@pytest.mark.parametrize("view", [lambda t: t, lambda t: t[3:7], lambda t: t.view(2, 50)[1], lambda t: t.detach()])
def test_never_while_it_is_referred_to(view: object) -> None:
    scratch = Scratch()
    kept = view(scratch.take(100, torch.float32, CPU))  # type: ignore[operator]
    kept.fill_(1)
    scratch.take(100, torch.float32, CPU).fill_(2)
    assert kept.eq(1).all()


def test_larger_memory_takes_the_place_of_smaller() -> None:
    scratch = Scratch()
    for count in (10, 1000, 100_000):
        assert scratch.take(count, torch.float32, CPU).shape == (count,)
    assert [storage.nbytes() for storage in scratch._held] == [400_000]


def test_large_memory_is_not_kept() -> None:
    scratch = Scratch()
    scratch.take(_LOT_BYTES // 4 + 1, torch.float32, CPU)
    assert scratch._held == []


def test_gradients_stay_in_memory_of_their_own() -> None:
    scratch = Scratch()
    scatter = AllToAllReduceScatter(scratch, shards=2)
    sent = scatter.allocate((100,), dtype=torch.float32, device=CPU)
    gradient = scatter.allocate((50,), dtype=torch.float32, device=CPU)
    assert place(gradient) not in [storage.data_ptr() for storage in scratch._held]
    where = place(sent)
    del sent
    assert place(scatter.allocate((100,), dtype=torch.float32, device=CPU)) == where
