"""Help for the loader tests: every rank of a data axis played in one process, and datasets that misbehave."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from accel.config import Config
from accel.runtime.loader import PreparedLoader


@dataclass(frozen=True)
class Step:
    """A batch as a rank sees it."""

    batch: list[Any]
    counts: tuple[int, ...]
    weight: float
    remaining: int


def prepared(make: Callable[[], DataLoader[Any]], size: int, **settings: Any) -> list[PreparedLoader]:
    """The loader of each rank; `make` is called for each, as each process runs the user's script."""
    config = Config().replace(**settings)
    return [PreparedLoader(make(), size=size, index=rank, config=config) for rank in range(size)]


def steps(loader: PreparedLoader) -> list[Step]:
    """One epoch of a rank."""
    return [Step(listed(batch), loader.counts, loader.weight, loader.remaining) for batch in loader]


def epoch(loaders: list[PreparedLoader]) -> list[list[Any]]:
    """The real samples of each global batch of an epoch, in order, with every rank's batches side by side."""
    ranks = [steps(loader) for loader in loaders]
    assert len({len(rank) for rank in ranks}) == 1
    globals_ = []
    for row in zip(*ranks, strict=True):
        assert len({step.counts for step in row}) == 1
        assert all(len(step.batch) == (count or 1) for step, count in zip(row, row[0].counts, strict=True))
        globals_.append(
            [sample for step, count in zip(row, row[0].counts, strict=True) for sample in step.batch[:count]]
        )
    return globals_


def listed(batch: Any) -> list[Any]:
    """A batch of numbers as a list; a single sample as a list of one."""
    return torch.as_tensor(batch).reshape(-1).tolist()


def flat(batches: list[list[Any]]) -> list[Any]:
    return [sample for batch in batches for sample in batch]


class Numbers(Dataset[int]):
    """0, 1, ... n - 1; remembers what it was asked for."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        self.asked.append(index)
        return index


class Stream(IterableDataset[int]):
    """0, 1, ... n - 1, dealt out among DataLoader workers; `claims` is what it says its length is."""

    def __init__(self, n: int, claims: int | None = None) -> None:
        self.n, self.claims = n, claims

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(range(info.id, self.n, info.num_workers) if info else range(self.n))

    def __len__(self) -> int:
        if self.claims is None:
            raise TypeError("this stream has no length")
        return self.claims


class RandomStream(Stream):
    """Numbers drawn from the global generators, and the epoch it was told."""

    told = -1

    def set_epoch(self, epoch: int) -> None:
        self.told = epoch

    def __iter__(self) -> Iterator[int]:
        for _ in super().__iter__():
            yield random.randrange(1000) + 1000 * int(numpy.random.randint(1000)) + 10**6 * int(torch.randint(1000, ()))


class Shuffler(Sampler[int]):
    """A user's own sampler, which draws from a global generator."""

    def __init__(self, n: int, source: str) -> None:
        self.n, self.source = n, source
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.n))
        if self.source == "python":
            random.shuffle(order)
        elif self.source == "numpy":
            numpy.random.shuffle(order)
        else:
            order = torch.randperm(self.n).tolist()
        yield from order

    def __len__(self) -> int:
        return self.n
