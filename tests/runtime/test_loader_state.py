"""Going on from the middle of an epoch: the same samples in the same order, on any number of processes."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from accel.errors import CheckpointError, PrepareError
from accel.runtime.data.order import Order, mix
from accel.runtime.data.share import Cut
from accel.runtime.loader import PreparedLoader, skip_first_batches

from .loaders import Numbers, RandomStream, Shuffler, Stream, epoch, flat, listed, prepared, steps

LOADERS = {
    "shuffle": lambda: DataLoader(Numbers(29), 2, shuffle=True),
    "custom": lambda: DataLoader(Numbers(29), 2, sampler=Shuffler(29, "numpy")),
    "batch_sampler": lambda: DataLoader(Numbers(29), batch_sampler=[list(range(i, i + 3)) for i in range(0, 27, 3)]),
    "single": lambda: DataLoader(Numbers(29), batch_size=None, shuffle=True),
    "stream": lambda: DataLoader(RandomStream(29), 2),
    "stream_workers": lambda: DataLoader(RandomStream(29), 2, num_workers=2),
    "workers": lambda: DataLoader(Numbers(29), 2, shuffle=True, num_workers=2),
}


def consume(loaders: list[PreparedLoader], batches: int) -> dict[str, Any]:
    """Take some batches of an epoch on every rank, as a loop that stops for a checkpoint; returns the state."""
    states = []
    for loader in loaders:
        iterator = iter(loader)
        for _ in islice(iterator, batches):
            pass
        states.append(loader.state_dict())
        iterator.close()
    assert all(state == states[0] for state in states)
    return states[0]


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("batches", [0, 1, 3])
def test_resuming_goes_on_with_the_next_sample(name: str, batches: int) -> None:
    make = LOADERS[name]
    whole = prepared(make, 2)
    epochs = [epoch(whole) for _ in range(4)]
    saving = prepared(make, 2)
    epoch(saving)
    state = consume(saving, batches) if batches else saving[0].state_dict()
    resumed = prepared(make, 2)
    for loader in resumed:
        loader.load_state_dict(state)
        assert loader.state_dict() == state and loader.epoch == 1
    assert [epoch(resumed) for _ in range(3)] == [epochs[1][batches:], *epochs[2:]]


@pytest.mark.parametrize("name", LOADERS)
def test_resuming_on_another_number_of_processes(name: str) -> None:
    make = LOADERS[name]
    one = prepared(make, 1)
    epochs = [flat(epoch(one)) for _ in range(2)]
    state = consume(prepared(make, 2), 2)
    consumed = sum(state["samples"])
    for size in (1, 3):
        resumed = prepared(make, size)
        for loader in resumed:
            loader.load_state_dict(state)
        left, following = flat(epoch(resumed)), flat(epoch(resumed))
        if name == "stream_workers":  # each worker goes on in its own part; their turns come in global batches
            assert len(left) == 29 - consumed and set(left) <= set(epochs[0])
            assert sorted(following) == sorted(epochs[1])
        else:
            assert (left, following) == (epochs[0][consumed:], epochs[1])


def test_the_position_counts_what_was_yielded_and_not_what_was_read_ahead() -> None:
    loader = PreparedLoader(DataLoader(Stream(20), 2), size=2, index=0)
    assert loader.state_dict() == {"seed": 0, "epoch": 0, "samples": [0], "turn": 0}
    found = []
    for _ in loader:
        found.append(loader.state_dict()["samples"])
    assert found == [[4], [8], [12], [16], [20]]
    assert loader.state_dict() == {"seed": 0, "epoch": 1, "samples": [0], "turn": 0}


def test_a_resumed_map_style_dataset_is_not_asked_for_what_is_left_out() -> None:
    state = consume(prepared(lambda: DataLoader(Numbers(20), 2), 1), 4)
    dataset = Numbers(20)
    loader = PreparedLoader(DataLoader(dataset, 2))
    loader.load_state_dict(state)
    list(loader)
    assert dataset.asked == list(range(8, 20))


def test_a_long_permutation_is_that_of_torchs_sampler_from_wherever_it_is_begun() -> None:
    """It is not gone through to get there, and yet the same."""
    sampler, skipped = RandomSampler(range(10_000)), 4097
    order = Order(DataLoader(Numbers(10_000), 4, sampler=sampler), Cut(1, 4))
    sampler.generator = torch.Generator().manual_seed(mix(3, 5))
    blocks = [index for (block,) in order.blocks(3, 5, skipped) for index in block]
    assert blocks == list(sampler)[skipped:]


def test_in_a_zip_the_epoch_of_a_longer_loader_ends_with_the_shorter_ones() -> None:
    """Also if it goes on at the shorter one's end, where zip asks the longer one for nothing any more."""

    def pair() -> list[PreparedLoader]:
        return [PreparedLoader(DataLoader(Numbers(n), 2, shuffle=True)) for n in (4, 9)]

    whole = pair()
    epochs = [list(zip(*whole, strict=False)) for _ in range(2)]
    saving = pair()
    states = [[loader.state_dict() for loader in saving] for _ in zip(*saving, strict=False)]
    resumed = pair()
    for loader, state in zip(resumed, states[-1], strict=True):
        loader.load_state_dict(state)
    assert list(zip(*resumed, strict=False)) == []
    assert str(list(zip(*resumed, strict=False))) == str(epochs[1])


def test_a_position_that_is_loaded_after_iter_counts() -> None:
    loader = PreparedLoader(DataLoader(Numbers(8), 2))
    iterator = iter(loader)
    loader.load_state_dict({"seed": 0, "epoch": 3, "samples": [6], "turn": 0})
    assert [batch.tolist() for batch in iterator] == [[6, 7]]
    assert loader.epoch == 4


def test_a_break_begins_the_next_epoch_but_can_be_saved() -> None:
    loader = PreparedLoader(DataLoader(Numbers(20), 2, shuffle=True))
    expected = PreparedLoader(DataLoader(Numbers(20), 2, shuffle=True))
    epochs = [flat(epoch([expected])) for _ in range(2)]
    for _ in loader:
        break
    state = loader.state_dict()
    assert (state["epoch"], state["samples"]) == (0, [2])
    assert flat(epoch([loader])) == epochs[1]


def test_set_epoch_and_a_loaded_position() -> None:
    state = {"seed": 0, "epoch": 3, "samples": [4], "turn": 0}
    for told, expected in ((3, 4), (5, 8)):
        loader = PreparedLoader(DataLoader(Numbers(8), 2))
        loader.load_state_dict(state)
        loader.set_epoch(told)
        assert loader.epoch == told
        assert len(flat([listed(batch) for batch in loader])) == expected


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("skip", [0, 2, 100])
def test_skip_first_batches_shortens_one_epoch(name: str, skip: int) -> None:
    reference = prepared(LOADERS[name], 2)
    epochs = [epoch(reference) for _ in range(3)]
    loaders = prepared(LOADERS[name], 2)
    views = [skip_first_batches(loader, skip) for loader in loaders]
    assert epoch(views) == epochs[0][skip:]
    assert epoch(loaders) == epochs[1]
    assert epoch(views) == epochs[2]


def test_skip_first_batches_counts_on_and_reads_nothing_of_what_it_skips() -> None:
    dataset = Numbers(9)
    loader = PreparedLoader(DataLoader(dataset, 2), size=2, index=1)
    loader.load_state_dict({"seed": 0, "epoch": 4, "samples": [4], "turn": 0})
    view = skip_first_batches(loader, 1)
    assert [(step.batch, step.remaining) for step in steps(view)] == [([6, 7], 2), ([8], 1)]
    assert dataset.asked == [6, 7, 8]
    assert loader.state_dict()["epoch"] == 5
    with pytest.raises(PrepareError, match="got -1"):
        skip_first_batches(loader, -1)


def test_a_state_of_another_loader_is_refused() -> None:
    loader = PreparedLoader(DataLoader(Stream(4), num_workers=2))
    with pytest.raises(CheckpointError, match="1 streams of data, this loader has 2"):
        loader.load_state_dict({"seed": 0, "epoch": 0, "samples": [3], "turn": 0})
    with pytest.raises(CheckpointError, match="no samples, turn"):
        loader.load_state_dict({"seed": 0, "epoch": 0})
