"""Reading the batches of one epoch through one inner torch DataLoader, which keeps the user's workers and options.

A reader yields, for each global batch, its `Share` and the collated batches of `places`: usually the one of this
process, those of all processes where one process reads for all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info

from ...errors import PrepareError
from .order import Order, apart, mix, set_epoch
from .seeded import seeded
from .share import Cut, Share, block_of, look_ahead, shared

Blocks: TypeAlias = list[list[Any] | None]
"""For each place the samples (or their indices) of its batch; None where it has no batch."""

Batches: TypeAlias = tuple[Share, list[Any]]
"""A global batch's share, and for each place its batch or None."""

END = object()


@dataclass(frozen=True)
class Start:
    """Where in which epoch the reading starts."""

    seed: int
    epoch: int
    samples: tuple[int, ...]
    """Samples already consumed of each stream."""

    turn: int = 0
    """The stream that the next batch comes from."""

    skip: int = 0
    """Global batches to leave out from there."""


@dataclass(frozen=True)
class Reading:
    """What both kinds of reader need to know."""

    cut: Cut
    places: Sequence[int]
    """The processes whose batches are read."""

    even: bool
    """Whether a process without samples reads a repeated one."""

    steps: int
    """Batches to be ahead, so that `Share.remaining` is known."""

    pin: bool
    """Whether batches are put in pinned memory."""

    def pick(self, blocks: list[list[Any]]) -> Blocks:
        """The blocks of the places."""
        return [block_of(blocks, place, self.even) for place in self.places]


class MapReader:
    """Reads a map-style dataset: the order is known before anything is read, so what is skipped costs nothing."""

    def __init__(self, loader: DataLoader[Any], order: Order, reading: Reading) -> None:
        self._dataset = loader.dataset
        self._order = order
        self._reading = reading
        self._indices = _Indices(order.cut.single, seeded=loader.num_workers > 0)
        self._random = torch.Generator()
        whole = {"batch_size": None, "sampler": self._indices}
        sampling = whole if loader.batch_sampler is None else {"batch_sampler": self._indices}
        self._inner: DataLoader[Any] = DataLoader(
            seeded(loader.dataset) if loader.num_workers else loader.dataset,
            collate_fn=loader.collate_fn,
            worker_init_fn=_WorkerInit(loader.worker_init_fn) if loader.num_workers else None,
            generator=self._random,
            **sampling,
            **_options(loader, reading.pin),
        )

    def read(self, start: Start) -> Iterator[Batches]:
        """The batches of an epoch in order; an IndexError of the dataset gets a note that says what was promised."""
        set_epoch(self._dataset, start.epoch)
        self._random.manual_seed(mix(start.seed, start.epoch, *self._reading.places))
        plan = look_ahead(self._plan(start), self._reading.steps)
        queue = self._indices.begin(plan, partial(mix, start.seed, start.epoch), self._reading.places)
        batches = _items(self._inner)
        while (first := self._fetch(batches)) is not END:
            share, blocks = queue.popleft()
            yield share, [first, *(None if block is None else self._fetch(batches) for block in blocks[1:])]
        if queue:
            raise PrepareError(
                f"the dataset {type(self._dataset).__name__} raised StopIteration for a sample that its length or the "
                "sampler promises; a map-style dataset must return the sample, or raise IndexError"
            )

    def _fetch(self, batches: Iterator[Any]) -> Any:
        try:
            return next(batches, END)
        except IndexError as error:
            error.add_note(
                f"while the loader read {type(self._dataset).__name__}: its length, or the loader's sampler, promises "
                "samples that it does not have"
            )
            raise

    def _plan(self, start: Start) -> Iterator[tuple[Share, Blocks]]:
        """What to read, batch by batch; the first place that is read always has samples, the others may have none."""
        (samples,) = start.samples
        blocks = self._order.blocks(start.seed, start.epoch, samples)
        for share, parts in islice(shared(blocks, samples), start.skip, None):
            picked = self._reading.pick(parts)
            if picked[0] is not None:
                yield share, picked


class _Indices(Sampler[Any]):
    """The inner loader's sampler: the planned indices, while the rest of the plan waits in a queue for the batches.

    Where workers read, each index comes with a seed that is a function of its place in the epoch.
    """

    def __init__(self, single: bool, seeded: bool) -> None:
        self._single, self._seeded = single, seeded

    def begin(
        self, plan: Iterator[tuple[Share, Blocks]], seed: Callable[[int], int], places: Sequence[int]
    ) -> deque[tuple[Share, Blocks]]:
        """Take the plan of the next iteration; what is returned fills as the inner loader asks for indices."""
        self._plan, self._seed, self._places = plan, seed, places
        self._queue = deque[tuple[Share, Blocks]]()
        return self._queue

    def __iter__(self) -> Iterator[Any]:
        queue = self._queue
        for share, blocks in self._plan:
            queue.append((share, blocks))
            for place, block in zip(self._places, blocks, strict=True):
                if block is not None:
                    items = self._with_seeds(share, place, block) if self._seeded else block
                    yield items[0] if self._single else items

    def _with_seeds(self, share: Share, place: int, block: list[Any]) -> list[tuple[int, Any]]:
        first = share.end - sum(share.counts[place:])
        return [(self._seed(number), index) for number, index in enumerate(block, first)]


class IterableReader:
    """Reads an iterable dataset: every process goes through all of it, and collates what is its own."""

    def __init__(self, loader: DataLoader[Any], reading: Reading) -> None:
        self._reading = reading
        self._random = torch.Generator()
        self._start = torch.zeros(3 + max(1, loader.num_workers), dtype=torch.int64)
        if loader.num_workers:
            self._start.share_memory_()  # type: ignore[no-untyped-call]
        self._inner: DataLoader[Any] = DataLoader(
            _Stream(loader.dataset, reading, self._start),
            batch_size=None,
            collate_fn=_Collate(loader.collate_fn, reading.cut.single),
            worker_init_fn=_WorkerInit(loader.worker_init_fn),
            generator=self._random,
            **_options(loader, reading.pin),
        )

    def read(self, start: Start) -> Iterator[Batches]:
        """The batches of an epoch in the order in which torch's workers take turns."""
        self._start.copy_(torch.tensor([start.seed, start.epoch, start.turn, *start.samples]))
        self._random.manual_seed(mix(start.seed, start.epoch))
        received = (item for item in _items(self._inner) if item is not None)
        batches = (item for item in islice(received, start.skip, None) if item[1][0] is not None)
        return look_ahead(batches, self._reading.steps)


class _Stream(IterableDataset[Any]):
    """The samples of the places, and with them the share; lives in the process or worker that reads."""

    def __init__(self, dataset: Any, reading: Reading, start: torch.Tensor) -> None:
        self.dataset = dataset
        self._reading = reading
        self._start = start
        """Seed, epoch, turn, each stream's samples: in shared memory, because persistent workers outlive an epoch."""

    def __iter__(self) -> Iterator[tuple[Share, Blocks] | None]:
        info = get_worker_info()
        stream = info.id if info else 0
        seed, epoch, turn, *samples = self._start.tolist()
        if stream < turn:
            yield None  # so that the workers' round begins with the one whose turn it is
        set_epoch(self.dataset, epoch)
        start = samples[stream]
        blocks = apart(lambda: self._reading.cut.blocks(self.dataset, start), mix(seed, epoch, stream))
        for share, parts in shared(blocks, start, stream):
            yield share, self._reading.pick(parts)


@dataclass(frozen=True)
class _Collate:
    """The user's collate function, for each place."""

    collate: Callable[[Any], Any]
    single: bool

    def __call__(self, item: Any) -> Batches | None:
        if item is None:
            return None
        share, blocks = item
        return share, [None if b is None else self.collate(b[0] if self.single else b) for b in blocks]


@dataclass(frozen=True)
class _WorkerInit:
    """Shows the user's worker function, and the dataset, the user's own dataset as that of the worker."""

    function: Callable[[int], None] | None

    def __call__(self, worker: int) -> None:
        info = get_worker_info()
        object.__setattr__(info, "dataset", info.dataset.dataset)  # type: ignore[union-attr]
        if self.function is not None:
            self.function(worker)


def _items(loader: DataLoader[Any]) -> Iterator[Any]:
    """What a loader of torch's gives. Its workers end with it, also where the traceback of an error would keep them."""
    items: Any = iter(loader)
    try:
        yield from items
    finally:
        if loader.num_workers and not loader.persistent_workers:
            items._shutdown_workers()


def _options(loader: DataLoader[Any], pin: bool) -> dict[str, Any]:
    """What the inner loader takes over from the user's as it is."""
    return {
        "num_workers": loader.num_workers,
        "pin_memory": pin,
        "timeout": loader.timeout,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
    }
