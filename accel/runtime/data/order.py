"""The sequence of samples of an epoch: a function of (seed, epoch), the same in every process."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from types import TracebackType
from typing import Any, TypeVar

import numpy
import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ...errors import PrepareError
from .share import Cut

T = TypeVar("T")

SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
"""Torch's samplers that draw from their `generator` and from nothing else."""

STRETCH = 4096
"""Samples whose numbers are made at a time."""


def mix(*numbers: int) -> int:
    """One seed from several numbers, so that near ones share nothing."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_of(loader: DataLoader[Any], default: int) -> int:
    """The seed of a generator that the user gave to the loader or its samplers, else the default."""
    generators = [loader.generator, *_generators(loader)]
    return next((g.initial_seed() for g in generators if g is not None), default)


class Order:
    """The order in which a user's loader over a map-style dataset visits its samples, in every epoch.

    Raises PrepareError for a sampler that has divided the samples among processes already.
    """

    def __init__(self, loader: DataLoader[Any], cut: Cut) -> None:
        self.cut = cut
        top = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self.sampler: Any = top if cut.batch is None else top.sampler  # type: ignore[union-attr]
        self._generators = _generators(loader)
        for sampler in _chain(loader):
            if getattr(sampler, "num_replicas", 1) > 1 and type(self.sampler) is not DistributedSampler:
                raise PrepareError(
                    f"the loader's {type(sampler).__name__} has already divided the samples among processes, which "
                    "prepare() does as well; give the DataLoader the same sampler for one process instead"
                )

    @property
    def known(self) -> bool:
        """Whether the sampler's length can be believed: torch's own samplers do what they say."""
        return type(self.sampler) in (SequentialSampler, DistributedSampler, *SHUFFLING)

    def __len__(self) -> int:
        """Items of an epoch's sequence; raises TypeError where the sampler has no length."""
        items: Any = self.sampler.dataset if type(self.sampler) is DistributedSampler else self.sampler
        return len(items)

    def blocks(self, seed: int, epoch: int, skip: int) -> Iterator[list[list[Any]]]:
        """The blocks of all processes for each global batch of an epoch, after its first `skip` samples."""
        draw = mix(seed, epoch)
        if type(self.sampler) in SHUFFLING:
            sampler = copy.copy(self.sampler)
            sampler.generator = torch.Generator().manual_seed(draw)
            return self.cut.blocks(_after(sampler, skip))
        if type(self.sampler) is DistributedSampler:
            return self.cut.blocks(_undistributed(self.sampler, epoch), skip)
        if isinstance(self.sampler, SequentialSampler | list | tuple | range):
            return self.cut.blocks(self.sampler, skip)
        set_epoch(self.sampler, epoch)
        return apart(lambda: self.cut.blocks(self.sampler, skip), draw, self._generators)


def _after(sampler: Any, skip: int) -> Iterator[int]:
    """What one of torch's samplers draws, after the first `skip`; of a permutation, that is not gone through."""
    if type(sampler) is not RandomSampler or sampler.replacement or sampler.num_samples != len(sampler.data_source):
        return islice(sampler, skip, None)
    permutation = torch.randperm(sampler.num_samples, generator=sampler.generator)
    return chain.from_iterable(part.tolist() for part in torch.split(permutation[skip:], STRETCH))


def set_epoch(target: Any, epoch: int) -> None:
    """Tell the epoch to whatever wants to know it."""
    if callable(tell := getattr(target, "set_epoch", None)):
        tell(epoch)


def apart(make: Callable[[], Iterable[T]], seed: int, generators: Iterable[torch.Generator] = ()) -> Iterator[T]:
    """Iterate code of the user's with random numbers of its own, a function of the seed.

    Python's, numpy's and torch's global generators, and those given, are replaced while an item is made, and put
    back after it: what the user draws elsewhere neither changes the items nor is changed by them.
    """
    randomness = _Randomness(seed, generators)
    with randomness:
        items = iter(make())
    while True:
        with randomness:
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


class _Randomness:
    """A context in which the global random generators have a state of their own, kept from one use to the next."""

    def __init__(self, seed: int, generators: Iterable[torch.Generator]) -> None:
        self._generators = [torch.default_generator, *generators]
        self._python = random.Random(seed).getstate()
        self._numpy: Any = numpy.random.MT19937(seed)  # exchanged as an object: numpy's state takes 30 us to copy
        self._torch = [torch.Generator().manual_seed(seed).get_state() for _ in self._generators]

    def __enter__(self) -> None:
        self._swap()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._swap()

    def _swap(self) -> None:
        python, self._python = self._python, random.getstate()
        random.setstate(python)
        numpys, self._numpy = self._numpy, numpy.random.get_bit_generator()  # type: ignore[attr-defined]
        numpy.random.set_bit_generator(numpys)  # type: ignore[attr-defined]
        torchs, self._torch = self._torch, [generator.get_state() for generator in self._generators]
        for generator, state in zip(self._generators, torchs, strict=True):
            generator.set_state(state)


def _chain(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's samplers from the outermost in."""
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    while sampler is not None:
        yield sampler
        sampler = getattr(sampler, "sampler", None)


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """The user's own generators that the loader's samplers draw from."""
    found = (getattr(sampler, "generator", None) for sampler in _chain(loader))
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _undistributed(sampler: DistributedSampler[Any], epoch: int) -> DistributedSampler[Any]:
    """The same sampler for a single process: the sequence that all its replicas together divide among them."""
    whole: DistributedSampler[Any] = DistributedSampler(sampler.dataset, 1, 0, sampler.shuffle, sampler.seed)
    whole.set_epoch(epoch)
    return whole
