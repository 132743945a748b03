"""Which samples of an epoch belong to which process: pure arithmetic on sequences.

The global batch i is the same samples for any number of processes; process r takes its r-th contiguous block. An
incomplete global batch is cut into blocks as equal as possible. Padding it with repeated samples, as is common,
would count some samples twice; here what is repeated has a count of 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple, TypeVar

from torch.utils.data import BatchSampler, DataLoader

T = TypeVar("T")


class Share(NamedTuple):
    """What is known of one global batch, beside its data."""

    counts: tuple[int, ...]
    """Real samples of each process."""

    end: int
    """Samples of the stream that are consumed once this batch is."""

    stream: int = 0
    """The DataLoader worker whose stream this is, for an iterable dataset; else 0."""

    remaining: int = 0
    """Batches from this one to the last, at most one more than the look-ahead."""


@dataclass(frozen=True)
class Cut:
    """How the sequence of a single process becomes global batches, and these the blocks of `size` processes."""

    size: int
    """Processes of the data axis."""

    batch: int | None
    """Samples in a global batch; None where the sequence is of whole batches already."""

    drop_last: bool = False
    """Whether an incomplete last global batch is left out."""

    split: bool = False
    """For whole batches: each is cut among the processes, instead of given to one."""

    single: bool = False
    """Each sample is a batch (`batch_size=None`)."""

    @classmethod
    def of(cls, loader: DataLoader[Any], size: int, split: bool) -> Cut:
        """The cut that the user's loader asks for."""
        batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        if type(batches) is BatchSampler:
            return cls(size, batches.batch_size * (1 if split else size), batches.drop_last)
        single = loader.batch_sampler is None and not isinstance(batches, BatchSampler)
        return cls(size, None, split=split and not single, single=single)

    def blocks(self, sequence: Iterable[Any], skip: int = 0) -> Iterator[list[list[Any]]]:
        """The blocks of all processes for each global batch, from the sample after the first `skip`."""
        if self.batch is not None:
            return self._of_samples(islice(sequence, skip, None), self.batch)
        batches = ([item] for item in sequence) if self.single else (list(batch) for batch in sequence)
        return self._of_batches(_after(batches, skip))

    def length(self, items: int, place: int | None = None) -> int:
        """Global batches in a sequence of `items`; with `place`, only those of which that process has samples."""
        per_batch = self.batch or (1 if self.split else self.size)
        full, rest = divmod(items, per_batch)
        return full + (rest > 0 and not self.drop_last and (place is None or rest > place))

    def uneven(self, items: int) -> bool:
        """Whether a sequence of that many samples has a global batch of which the processes have unequal numbers."""
        assert self.batch is not None
        full, rest = divmod(items, self.batch)
        return bool((full and self.batch % self.size) or (not self.drop_last and rest % self.size))

    def _of_samples(self, samples: Iterator[T], length: int) -> Iterator[list[list[T]]]:
        while batch := list(islice(samples, length)):
            if len(batch) < length and self.drop_last:
                return
            yield split_evenly(batch, self.size)

    def _of_batches(self, batches: Iterator[list[T]]) -> Iterator[list[list[T]]]:
        if self.split:
            yield from (split_evenly(batch, self.size) for batch in batches)
            return
        while group := list(islice(batches, self.size)):
            yield group + [[] for _ in range(self.size - len(group))]


def split_evenly(items: Sequence[T], parts: int) -> list[list[T]]:
    """Contiguous blocks whose lengths differ by at most one, the longer ones first."""
    length, longer = divmod(len(items), parts)
    starts = [place * length + min(place, longer) for place in range(parts + 1)]
    return [list(items[start:end]) for start, end in pairwise(starts)]


def shared(blocks: Iterable[list[list[T]]], start: int, stream: int = 0) -> Iterator[tuple[Share, list[list[T]]]]:
    """Each global batch with its share, where `start` samples of the stream came before."""
    for parts in blocks:
        counts = tuple(map(len, parts))
        start += sum(counts)
        yield Share(counts, start, stream), parts


def block_of(blocks: list[list[T]], place: int, even: bool) -> list[T] | None:
    """What a process reads of a global batch: its block, else one repeated sample, else (not `even`) nothing."""
    if blocks[place] or not even:
        return blocks[place] or None
    return next(filter(None, blocks))[:1]


def weight(counts: tuple[int, ...], place: int) -> float:
    """What the mean loss of a process counts in a mean over processes, so that each sample counts the same."""
    return counts[place] * len(counts) / sum(counts)


def look_ahead(items: Iterable[tuple[Share, T]], steps: int) -> Iterator[tuple[Share, T]]:
    """Fill in `remaining` by being `steps` ahead: exact up to `steps`, and `steps + 1` for all that is more."""
    window: deque[tuple[Share, T]] = deque()
    for item in items:
        window.append(item)
        if len(window) > steps:
            share, content = window.popleft()
            yield share._replace(remaining=steps + 1), content
    while window:
        share, content = window.popleft()
        yield share._replace(remaining=len(window) + 1), content


def _after(batches: Iterator[list[T]], skip: int) -> Iterator[list[T]]:
    """The non-empty batches after the first `skip` samples; a batch that lies across the border loses its head."""
    batches = filter(None, batches)
    while skip > 0 and (batch := next(batches, None)) is not None:
        if len(batch) > skip:
            return chain([batch[skip:]], batches)
        skip -= len(batch)
    return batches
