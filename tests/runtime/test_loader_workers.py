"""Worker processes: the user's options reach them, and an iterable dataset is divided inside them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from accel.runtime.loader import PreparedLoader

from .loaders import Numbers, RandomStream, Stream, epoch, flat, listed, prepared


@pytest.mark.parametrize("shuffle", [False, True])
def test_workers_change_nothing_for_a_map_style_dataset(shuffle: bool) -> None:
    without = epoch(prepared(lambda: DataLoader(Numbers(11), 2, shuffle=shuffle), 3))
    assert epoch(prepared(lambda: DataLoader(Numbers(11), 2, shuffle=shuffle, num_workers=2), 3)) == without


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("n", [0, 1, 3, 13])
def test_an_iterable_dataset_is_divided_inside_its_workers(n: int, drop_last: bool) -> None:
    plain = DataLoader(Stream(n), 4, drop_last=drop_last, num_workers=2)
    loaders = prepared(lambda: DataLoader(Stream(n), 2, drop_last=drop_last, num_workers=2), 2)
    assert epoch(loaders) == [batch.tolist() for batch in plain]


def test_without_even_batches_the_order_of_workers_is_kept() -> None:
    loaders = prepared(lambda: DataLoader(Stream(9), 1, num_workers=2), 2, even_batches=False)
    assert [[listed(batch) for batch in loader] for loader in loaders] == [
        [[0], [1], [4], [5], [8]],
        [[2], [3], [6], [7]],
    ]


class Identities(Numbers):
    """Which process read a sample."""

    def __getitem__(self, index: int) -> int:
        return os.getpid()


@pytest.mark.parametrize("persistent", [False, True])
def test_persistent_workers_persist_and_others_are_started_once_an_epoch(persistent: bool) -> None:
    loader = PreparedLoader(DataLoader(Identities(8), 1, num_workers=2, persistent_workers=persistent))
    epochs = [set(flat([listed(batch) for batch in loader])) for _ in range(2)]
    assert [len(workers) for workers in epochs] == [2, 2]
    assert (epochs[0] == epochs[1]) == persistent
    assert os.getpid() not in epochs[0]


def test_persistent_workers_know_the_epoch_also_after_a_break() -> None:
    def make(persistent: bool) -> DataLoader[Any]:
        return DataLoader(RandomStream(12), 1, num_workers=2, persistent_workers=persistent)

    expected = prepared(lambda: make(False), 2)
    epochs = [flat(epoch(expected)) for _ in range(3)]
    loaders = prepared(lambda: make(True), 2)
    for loader in loaders:
        assert listed(next(iter(loader)))[0] in epochs[0]
    assert [flat(epoch(loaders)) for _ in range(2)] == epochs[1:]


class Epochs(IterableDataset[int]):
    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield self.epoch


@pytest.mark.parametrize("workers", [0, 1])
def test_an_iterable_dataset_is_told_the_epoch(workers: int) -> None:
    loader = PreparedLoader(DataLoader(Epochs(), num_workers=workers, persistent_workers=bool(workers)))
    assert [listed(next(iter(loader))) for _ in range(3)] == [[0], [1], [2]]


def narrow(worker: int) -> None:
    """A user's worker function that changes the worker's copy of the dataset, as torch's documentation does."""
    info = get_worker_info()
    assert type(info.dataset) is Stream
    info.dataset.n = 4


def test_a_worker_function_sees_the_users_dataset() -> None:
    loaders = prepared(lambda: DataLoader(Stream(100), 1, num_workers=2, worker_init_fn=narrow), 2)
    assert sorted(flat(epoch(loaders))) == [0, 1, 2, 3]


class Noisy(Numbers):
    def __getitem__(self, index: int) -> int:
        return int(torch.randint(10**9, ()))


def test_augmentation_in_workers_differs_per_rank_and_is_reproducible() -> None:
    def noise() -> list[list[int]]:
        loaders = prepared(lambda: DataLoader(Noisy(4), 1, num_workers=1), 2)
        return [[flat([listed(batch) for batch in loader]) for _ in range(2)] for loader in loaders]

    first = noise()
    torch.manual_seed(1), random.seed(1)
    assert noise() == first
    assert len({value for rank in first for values in rank for value in values}) == 8


class Augmented(Numbers):
    """Draws from every generator, as many numbers as chance has it."""

    def __getitem__(self, index: int) -> Any:
        drawn = [random.random() for _ in range(random.randrange(3))]
        return [index, *drawn, float(numpy.random.rand()), float(torch.rand(()))]


class AugmentedInBulk(Augmented):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


@pytest.mark.parametrize("kind", [Augmented, AugmentedInBulk])
def test_augmentation_in_workers_goes_on_where_it_was(kind: type[Numbers]) -> None:
    """After a resume, in workers that have read nothing, and by sample on other numbers of workers and processes."""

    def loaders(size: int, workers: int) -> list[PreparedLoader]:
        def make() -> DataLoader[Any]:
            return DataLoader(kind(24), 12 // size, shuffle=True, num_workers=workers, collate_fn=list)

        return prepared(make, size)

    def read(size: int, workers: int, state: dict[str, Any] | None = None) -> list[Any]:
        parts = []
        for loader in loaders(size, workers):
            if state:
                loader.load_state_dict(state)
            parts.append(list(loader))
        return [sample for batches in zip(*parts, strict=True) for batch in batches for sample in batch]

    whole = read(1, 1)
    assert len({tuple(sample[1:]) for sample in whole}) == 24
    [loader] = loaders(1, 1)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    del iterator
    assert read(1, 1, state) == whole[12:]
    if kind is Augmented:
        assert read(2, 2) == whole
        assert read(2, 1, state) == whole[12:]


def test_the_users_options_reach_the_workers() -> None:
    loader = PreparedLoader(
        DataLoader(
            Numbers(4), 2, num_workers=1, prefetch_factor=3, timeout=30, multiprocessing_context="fork", pin_memory=True
        )
    )
    assert flat([listed(batch) for batch in loader]) == [0, 1, 2, 3]
    inner = loader._reader._inner  # type: ignore[union-attr]
    assert (inner.prefetch_factor, inner.timeout, inner.pin_memory) == (3, 30, False)
    assert inner.multiprocessing_context.get_start_method() == "fork"


def test_spawned_workers() -> None:
    loaders = prepared(lambda: DataLoader(Stream(5), 2, num_workers=1, multiprocessing_context="spawn"), 1)
    assert epoch(loaders) == [[0, 1], [2, 3], [4]]


def test_an_error_in_a_worker_is_the_users() -> None:
    loader = PreparedLoader(DataLoader(Broken(4), num_workers=1))
    with pytest.raises(ValueError, match="sample 2 is damaged"):
        list(loader)


class Broken(Numbers):
    def __getitem__(self, index: int) -> int:
        if index == 2:
            raise ValueError("sample 2 is damaged")
        return index
