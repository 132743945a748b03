"""The union over ranks of an epoch is a single process's epoch, for every way to ask torch for batches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from accel.config import Config
from accel.errors import PrepareError
from accel.runtime.loader import PreparedLoader

from .loaders import Numbers, RandomStream, Shuffler, Stream, epoch, flat, listed, prepared, steps

SIZES = (1, 2, 3, 4)


class Stopping(Numbers):
    """Ends before its length."""

    def __getitem__(self, index: int) -> int:
        if index >= 2:
            raise StopIteration
        return index


def plain(dataset: Any, batch_size: int, drop_last: bool) -> list[list[int]]:
    return [batch.tolist() for batch in DataLoader(dataset, batch_size, drop_last=drop_last)]


@pytest.mark.parametrize("kind", [Numbers, Stream])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_global_batches_are_those_of_one_process(size: int, drop_last: bool, split: bool, kind: type) -> None:
    for n in range(31):
        for batch_size in (1, 3, 4):
            whole = batch_size if split else batch_size * size
            loaders = prepared(
                lambda n=n, b=batch_size: DataLoader(kind(n), b, drop_last=drop_last), size, split_batches=split
            )
            assert epoch(loaders) == plain(kind(n), whole, drop_last), (n, batch_size)
            for loader in loaders:
                assert all(max(loader.counts) - min(loader.counts) <= 1 for _ in loader)


@pytest.mark.parametrize("size", SIZES)
def test_length_remaining_and_end(size: int) -> None:
    for n in range(20):
        for loader in prepared(lambda n=n: DataLoader(Numbers(n), 2), size, gradient_accumulation_steps=3):
            ends = []
            seen = steps(loader)
            for _ in loader:
                ends.append(loader.end_of_dataloader)
            assert len(seen) == len(loader) == len(ends)
            assert [step.remaining for step in seen] == [min(left, 4) for left in range(len(seen), 0, -1)]
            assert ends == [False] * (len(seen) - 1) + [True] * bool(seen)
            assert loader.remaining == 0 and loader.counts == () and not loader.end_of_dataloader


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("split", [False, True])
def test_weighted_mean_losses_average_to_that_of_one_process(size: int, split: bool) -> None:
    for n in range(1, 25):
        loaders = prepared(lambda n=n: DataLoader(Numbers(n), 3), size, split_batches=split)
        ranks = [steps(loader) for loader in loaders]
        expected = plain(Numbers(n), 3 if split else 3 * size, False)
        for row, batch in zip(zip(*ranks, strict=True), expected, strict=True):
            losses = [step.weight * numpy.mean(numpy.square(step.batch)) for step in row]
            assert numpy.mean(losses) == pytest.approx(numpy.mean(numpy.square(batch)))
        assert loaders[0].uneven == any(step.weight != 1 for rank in ranks for step in rank)


def test_without_even_batches_a_process_may_have_fewer() -> None:
    loaders = prepared(lambda: DataLoader(Numbers(9), 2), 4, even_batches=False)
    assert [[step.batch for step in steps(loader)] for loader in loaders] == [
        [[0, 1], [8]], [[2, 3]], [[4, 5]], [[6, 7]],
    ]  # fmt: skip
    assert [len(loader) for loader in loaders] == [2, 1, 1, 1]
    assert [[step.remaining for step in steps(loader)] for loader in loaders] == [[2, 1], [1], [1], [1]]


@pytest.mark.parametrize("kind", [Numbers, Stream])
@pytest.mark.parametrize("size", SIZES)
def test_without_batching_each_sample_is_a_batch(size: int, kind: type) -> None:
    for n in range(7):
        loaders = prepared(lambda n=n: DataLoader(kind(n), batch_size=None), size)
        assert flat(epoch(loaders)) == list(range(n))
    batch = next(iter(prepared(lambda: DataLoader(kind(3), batch_size=None), 1)[0]))
    assert batch == 0 and not isinstance(batch, list)


@pytest.mark.parametrize("size", SIZES)
def test_a_batch_sampler_of_ones_own(size: int) -> None:
    batches = [[0], [1, 2, 3], [4, 5], [6], [7, 8, 9, 10], [], [11, 12]]
    loaders = prepared(lambda: DataLoader(Numbers(13), batch_sampler=batches), size)
    ranks = [steps(loader) for loader in loaders]
    full = [batch for batch in batches if batch]
    for i, row in enumerate(zip(*ranks, strict=True)):
        group = full[i * size : (i + 1) * size]
        assert [step.batch[:count] for step, count in zip(row, row[0].counts, strict=True) if count] == group
        means = [step.weight * numpy.mean(step.batch) for step in row]
        assert numpy.mean(means) == pytest.approx(numpy.mean(flat(group)))
    split = prepared(lambda: DataLoader(Numbers(13), batch_sampler=batches), size, split_batches=True)
    assert epoch(split) == full


def test_a_batch_sampler_used_as_sampler_reads_in_bulk() -> None:
    class Bulk(Numbers):
        def __getitem__(self, index: Any) -> Any:
            return torch.tensor(index)

    def make() -> DataLoader[Any]:
        return DataLoader(Bulk(9), sampler=BatchSampler(SequentialSampler(range(9)), 2, False), batch_size=None)

    assert epoch(prepared(make, 2)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


SAMPLERS = {
    "shuffle": lambda: DataLoader(Numbers(23), 2, shuffle=True),
    "replacement": lambda: DataLoader(Numbers(23), 2, sampler=RandomSampler(range(23), True, num_samples=40)),
    "num_samples": lambda: DataLoader(Numbers(23), 2, sampler=RandomSampler(range(23), num_samples=40)),
    "subset": lambda: DataLoader(Numbers(23), 2, sampler=SubsetRandomSampler(range(3, 20))),
    "weighted": lambda: DataLoader(Numbers(23), 2, sampler=WeightedRandomSampler([1.0] * 23, 17)),
    "batch_sampler": lambda: DataLoader(Numbers(23), batch_sampler=BatchSampler(RandomSampler(range(23)), 2, False)),
    "distributed": lambda: DataLoader(Numbers(23), 2, sampler=DistributedSampler(range(23), 3, 1, drop_last=True)),
    "python": lambda: DataLoader(Numbers(23), 2, sampler=Shuffler(23, "python")),
    "numpy": lambda: DataLoader(Numbers(23), 2, sampler=Shuffler(23, "numpy")),
    "torch": lambda: DataLoader(Numbers(23), 2, sampler=Shuffler(23, "torch")),
    "stream": lambda: DataLoader(RandomStream(23), 2),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_shuffling_is_a_function_of_seed_and_epoch(name: str) -> None:
    make = SAMPLERS[name]
    with_one = prepared(make, 1)
    expected = [flat(epoch(with_one)) for _ in range(3)]
    assert expected[0] != expected[1] != expected[2]
    plain_length = len(flat([batch.tolist() for batch in make()])) if name != "distributed" else 23
    assert all(len(samples) == plain_length for samples in expected)
    for size in (2, 3):
        torch.manual_seed(size), random.seed(size), numpy.random.seed(size)
        loaders = prepared(make, size)
        assert [flat(epoch(loaders)) for _ in range(3)] == expected
        for loader in loaders:
            loader.set_epoch(1)
        assert flat(epoch(loaders)) == expected[1]
    if name != "distributed":
        assert flat(epoch(prepared(make, 2, data_seed=7))) != expected[0]


def test_shuffling_without_replacement_visits_each_sample_once() -> None:
    assert sorted(flat(epoch(prepared(SAMPLERS["shuffle"], 3)))) == list(range(23))
    assert sorted(flat(epoch(prepared(SAMPLERS["distributed"], 2)))) == list(range(23))


def test_a_users_generator_gives_the_seed_and_is_left_alone() -> None:
    def first(seed: int) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        loaders = prepared(lambda: DataLoader(Numbers(23), 2, shuffle=True, generator=generator), 2)
        before = generator.get_state()
        samples = flat(epoch(loaders))
        assert torch.equal(before, generator.get_state())
        return samples

    assert first(1) == first(1) != first(2)


def test_a_users_sampler_is_told_the_epoch() -> None:
    sampler = Shuffler(4, "torch")
    loader = PreparedLoader(DataLoader(Numbers(4), sampler=sampler))
    for _ in range(2):
        list(loader)
    loader.set_epoch(9)
    list(loader)
    assert sampler.told == [0, 1, 9]


@pytest.mark.parametrize("name", SAMPLERS)
def test_global_random_generators_are_left_alone(name: str) -> None:
    loader = prepared(SAMPLERS[name], 2)[0]
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    list(loader)
    assert before == (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_what_the_loop_draws_does_not_change_the_data() -> None:
    loader = PreparedLoader(DataLoader(RandomStream(8), 2))
    expected = flat(epoch([loader]))
    loader.set_epoch(0)
    found = []
    for batch in loader:
        torch.rand(3), random.random(), numpy.random.rand()
        found += batch.tolist()
    assert found == expected


def test_it_is_the_users_loader_to_look_at() -> None:
    dataset, collate = Numbers(5), torch.tensor
    loader = PreparedLoader(DataLoader(dataset, 2, collate_fn=collate, num_workers=0), size=2, index=1)
    assert isinstance(loader, DataLoader)
    assert (loader.dataset, loader.batch_size, loader.collate_fn, loader.num_workers) == (dataset, 2, collate, 0)
    assert isinstance(loader.sampler, SequentialSampler) and loader.multiprocessing_context is None
    assert (loader.total_batch_size, loader.total_dataset_length, loader.remainder) == (4, 5, 1)
    with pytest.raises(ValueError, match="batch_size"):
        loader.batch_size = 3
    with pytest.raises(AttributeError, match="colour"):
        loader.colour  # noqa: B018


def test_it_is_active_while_it_is_iterated() -> None:
    active: list[PreparedLoader] = []
    outer, inner = (PreparedLoader(DataLoader(Numbers(4)), active=active) for _ in range(2))
    for _ in outer:
        assert active == [outer]
        for _ in inner:
            assert active == [outer, inner]
            break
        assert active == [outer]
    assert active == []
    iterator = iter(outer)
    assert active == []
    next(iterator)
    assert active == [outer]
    iterator.close()
    assert active == []
    with pytest.raises(PrepareError, match="StopIteration"):
        list(PreparedLoader(DataLoader(Stopping(4)), active=active))
    assert active == []


def test_the_length_is_not_believed() -> None:
    for claims in (0, 3, 100):
        loaders = prepared(lambda c=claims: DataLoader(Stream(10, claims=c), 2), 2)
        assert flat(epoch(loaders)) == list(range(10))

    class Lying(Shuffler):
        def __len__(self) -> int:
            return 3

    loaders = prepared(lambda: DataLoader(Numbers(10), 2, sampler=Lying(10, "torch")), 2)
    assert sorted(flat(epoch(loaders))) == list(range(10))
    assert loaders[0].uneven is None


def test_no_length_is_torchs_type_error() -> None:
    with pytest.raises(TypeError, match="no length"):
        len(PreparedLoader(DataLoader(Stream(3))))
    assert len(PreparedLoader(DataLoader(Stream(10, claims=10), 2), size=2)) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_an_index_beyond_the_dataset_says_so(workers: int) -> None:
    class Short(Numbers):
        def __getitem__(self, index: int) -> int:
            if index >= 2:
                raise IndexError(f"no sample {index}")
            return index

    loader = PreparedLoader(DataLoader(Short(10), 2, num_workers=workers))
    with pytest.raises(IndexError, match="no sample 2") as caught:
        list(loader)
    assert "promises samples that it does not have" in caught.value.__notes__[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_stops_early_is_an_error(workers: int) -> None:
    with pytest.raises(PrepareError, match="Stopping raised StopIteration"):
        list(PreparedLoader(DataLoader(Stopping(10), 2, num_workers=workers)))


def test_an_error_of_an_iterable_dataset_is_the_users() -> None:
    class Broken(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            yield 1
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(PreparedLoader(DataLoader(Broken())))


def test_loaders_that_cannot_be_divided_are_refused() -> None:
    class Own(DataLoader[Any]):
        def __iter__(self) -> Any:
            return iter([])

    class OwnDistributed(DistributedSampler[Any]):
        pass

    class Collating(DataLoader[Any]):
        def __init__(self, dataset: Any) -> None:
            super().__init__(dataset, collate_fn=sum)

    with pytest.raises(PrepareError, match=r"Own overrides DataLoader\.__iter__"):
        PreparedLoader(Own(Numbers(3)))
    with pytest.raises(PrepareError, match="OwnDistributed has already divided"):
        PreparedLoader(DataLoader(Numbers(3), sampler=OwnDistributed(range(3), 2, 0)))
    assert list(PreparedLoader(Collating(Numbers(3)))) == [0, 1, 2]


def test_out_of_order_is_put_in_order_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="in_order=False"):
        loader = PreparedLoader(DataLoader(Numbers(8), 2, num_workers=2, in_order=False))
    assert flat(epoch([loader])) == list(range(8))


def test_the_default_config_is_that_of_one_process() -> None:
    loader = PreparedLoader(DataLoader(Numbers(5), 2), config=Config())
    assert [listed(batch) for batch in loader] == [[0, 1], [2, 3], [4]]
    assert loader.uneven is False
