"""The loader that `prepare` returns: this process's share of the user's batches, on its device.

Position in the data is a pure function of (seed, epoch, samples consumed), and independent of the number of
processes: a run goes on from any batch, on more or fewer of them, and reads no sample of a map-style dataset twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.utils.data import DataLoader, IterableDataset, IterDataPipe, MapDataPipe

from ..config import Config
from ..errors import CheckpointError, PrepareError
from .data.dispatch import dispatched
from .data.order import Order, seed_of
from .data.read import IterableReader, MapReader, Reading, Start
from .data.share import Cut, Share, weight
from .data.transfer import moved
from .lines import warn

_IN_ORDER = (
    "a prepared loader yields batches in order although the DataLoader says in_order=False: only so are all processes "
    "at the same batch"
)


@dataclass
class _Position:
    """Where in the data a loader is; shared with the views that `skip_first_batches` makes."""

    seed: int
    samples: list[int]
    """Samples consumed of each stream: one for each worker of an iterable dataset, else one."""

    turn: int = 0
    """The stream that the next batch comes from."""

    epoch: int = 0
    next_epoch: int = 0
    inside: bool = False
    """Whether `epoch` has begun and not come to its end."""

    resume: bool = False
    """Whether the next epoch begins at `samples` instead of at 0."""

    share: Share | None = None
    """That of the batch in the user's hands."""

    taken: int = 0

    def begin(self, skip: int | None) -> Start:
        if skip is not None or not self.resume:
            self.rewind()
        self.epoch, self.next_epoch = self.next_epoch, self.next_epoch + 1
        self.inside, self.resume, self.taken = True, False, 0
        return Start(self.seed, self.epoch, tuple(self.samples), self.turn, skip or 0)

    def advance(self, share: Share) -> None:
        self.share, self.taken = share, self.taken + 1
        self.samples[share.stream] = share.end
        self.turn = (share.stream + 1) % len(self.samples)

    def go_to(self, seed: int, epoch: int, samples: list[int], turn: int) -> None:
        self.seed, self.next_epoch, self.samples, self.turn = seed, epoch, samples, turn
        self.inside, self.resume = False, True

    def rewind(self) -> None:
        self.samples, self.turn = [0] * len(self.samples), 0
        self.inside = self.resume = False


class PreparedLoader(DataLoader[Any]):
    """This process's share of the batches of a user's DataLoader; `accelerator.prepare(loader)` makes it.

    What is not defined here (`dataset`, `batch_size`, `sampler`, ...) is the user's loader's. All processes of the
    data axis iterate alike. `size` is how many they are and `index` which of them this is; `group` gives their
    process group, which only `dispatch_batches` needs. While it is iterated the loader is in the stack `active`, and
    each time that the loop asks for a batch, `asked` is called with it first.

    Raises PrepareError for a loader whose batches cannot be divided: see `refuse`.
    """

    _DataLoader__initialized = True  # torch then refuses to set batch_size and the like, which would do nothing

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        size: int = 1,
        index: int = 0,
        device: torch.device | None = None,
        config: Config | None = None,
        group: Callable[[], ProcessGroup] | None = None,
        active: list[PreparedLoader] | None = None,
        asked: Callable[[PreparedLoader], None] | None = None,
    ) -> None:
        refuse(loader)
        if not loader.in_order and loader.num_workers and index == 0:
            warn(_IN_ORDER)
        config = config or Config()
        self.base_dataloader = loader
        self._config, self._device, self._size, self._index = config, device, size, index
        self._group = group if config.dispatch_batches and size > 1 else None
        self._active: list[PreparedLoader] = [] if active is None else active
        self._asked = asked or (lambda loader: None)
        self._cut = Cut.of(loader, size, config.split_batches)
        iterable = isinstance(loader.dataset, IterableDataset)
        self._order = None if iterable else Order(loader, self._cut)
        streams = max(1, loader.num_workers) if iterable else 1
        self._position = _Position(seed_of(loader, config.data_seed), [0] * streams)
        self._reader = None if self._group and index else self._make_reader()
        self._skip: int | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Begins the epoch at once: of `zip(a, b)` it is over for b, too, if a has no batch left when asked first."""
        skip, self._skip = self._skip, None
        return self._iterate(self._position.begin(skip), skip)

    def _iterate(self, start: Start, skip: int | None) -> Iterator[Any]:
        position = self._position
        if position.resume:  # a checkpoint was loaded since
            start = position.begin(skip)
        self._active.append(self)
        try:
            self._asked(self)
            for share, batch in moved(self._read(start), self._device):
                position.advance(share)
                yield batch
                self._asked(self)
            position.rewind()
        finally:
            position.share = None
            self._active[:] = [loader for loader in self._active if loader is not self]

    def __len__(self) -> int:
        """Batches of this process in an epoch; raises TypeError where the dataset or sampler has no length."""
        items = len(self.dataset) if self._order is None else len(self._order)  # type: ignore[arg-type]
        return self._cut.length(items, None if self._config.even_batches else self._index)

    def __getattr__(self, name: str) -> Any:
        if name == "base_dataloader":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.base_dataloader, name)

    @property
    def position(self) -> object:
        """What a loader and the views of it that `skip_first_batches` makes have in common, and no other loader."""
        return self._position

    @property
    def epoch(self) -> int:
        """The epoch of the current iteration, else of the next one; from 0."""
        return self._position.epoch if self._position.inside else self._position.next_epoch

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that of `epoch`. Without it, each iteration is one epoch further."""
        if not self._position.inside and epoch != self._position.next_epoch:
            self._position.rewind()
        self._position.next_epoch = epoch

    @property
    def counts(self) -> tuple[int, ...]:
        """Real samples of each process in the current global batch: 0 where a process has only a repeated one.

        Whole batches count as one sample each with `batch_size=None`. Empty outside of an iteration.
        """
        return self._position.share.counts if self._position.share else ()

    @property
    def whole_batches(self) -> bool:
        """Whether `counts` are of whole batches, which the dataset makes (`batch_size=None`), not of samples."""
        return self._cut.single

    @property
    def taken(self) -> int:
        """Batches that the iteration under way has given."""
        return self._position.taken

    @property
    def weight(self) -> float:
        """What this process's mean loss of the current batch must be multiplied by, so that all samples count alike."""
        return weight(self.counts, self._index) if self._position.share else 1.0

    @property
    def remaining(self) -> int:
        """Batches left, the current one included: exact up to `gradient_accumulation_steps`, else that plus 1."""
        return self._position.share.remaining if self._position.share else 0

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the last batch of the epoch is in the user's hands."""
        return self.remaining == 1

    @property
    def uneven(self) -> bool | None:
        """Whether some batch of an epoch has a weight other than 1; None if that is not known before its end."""
        if self._size == 1:
            return False
        if self._order is None or self._cut.batch is None or not self._order.known:
            return None
        return self._cut.uneven(len(self._order))

    @property
    def remainder(self) -> int:
        """Samples in the incomplete last global batch, 0 if it is complete, -1 while that is not known."""
        known = self._order is not None and self._order.known and self._cut.batch
        if known:
            return 0 if self._cut.drop_last else len(self._order) % known  # type: ignore[arg-type]
        return sum(self.counts) % (self._cut.batch or self._size) if self.end_of_dataloader else -1

    @property
    def total_batch_size(self) -> int:
        """Samples in a global batch; where the user's sampler makes the batches, batches in one."""
        return self._cut.batch or (1 if self._cut.split else self._size)

    @property
    def total_dataset_length(self) -> int:
        """Samples in the dataset; raises TypeError if it has no length."""
        return len(self.dataset)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """The position: seed, epoch, samples consumed (over all processes) of each stream, whose turn it is.

        The same on all processes. It counts the batches that the loop was given, including the current one.
        """
        at = self._position
        return {"seed": at.seed, "epoch": self.epoch, "samples": list(at.samples), "turn": at.turn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next iteration go on from that position, also on another number of processes.

        Raises CheckpointError if the position is that of another kind of loader.
        """
        if missing := {"seed", "epoch", "samples", "turn"} - set(state):
            raise CheckpointError(f"a loader's state has no {', '.join(sorted(missing))}: it has {sorted(state)}")
        samples, streams = list(state["samples"]), len(self._position.samples)
        if len(samples) != streams:
            raise CheckpointError(
                f"a loader's state is that of {len(samples)} streams of data, this loader has {streams}; an iterable "
                "dataset goes on only with the same num_workers"
            )
        self._position.go_to(state["seed"], state["epoch"], samples, state["turn"])

    def _read(self, start: Start) -> Iterator[tuple[Share, Any]]:
        batches = self._reader.read(start) if self._reader else None
        if self._group:
            batches = dispatched(batches, self._group())
        assert batches is not None
        return ((share, batch) for share, (batch,) in batches)

    def _make_reader(self) -> MapReader | IterableReader:
        places = range(self._size) if self._group else (self._index,)
        pin = self._device is not None and self._device.type == "cuda"
        steps = self._config.gradient_accumulation_steps
        reading = Reading(self._cut, places, self._config.even_batches, steps, pin)
        if self._order is None:
            return IterableReader(self.base_dataloader, reading)
        return MapReader(self.base_dataloader, self._order, reading)


def skip_first_batches(loader: PreparedLoader, batches: int) -> PreparedLoader:
    """A view of the loader whose next iteration leaves out the first batches of its epoch, and the others none.

    A map-style dataset is not asked for what is left out. The view and the loader count epochs together.
    """
    if batches < 0:
        raise PrepareError(f"skip_first_batches: expected a number of batches from 0, got {batches}")
    view = copy.copy(loader)
    view._skip = batches
    return view


def refuse(loader: DataLoader[Any]) -> None:
    """Raise PrepareError for a loader that does not read as torch's DataLoader does, so that it cannot be divided."""
    kind = type(loader)
    for name in ("__iter__", "_get_iterator", "_index_sampler"):
        if getattr(kind, name) is not getattr(DataLoader, name):
            raise PrepareError(
                f"prepare: {kind.__name__} overrides DataLoader.{name}, so its batches cannot be divided among "
                "processes; give prepare() a plain DataLoader, with the change in its dataset, sampler or collate_fn"
            )
    if isinstance(loader.dataset, IterDataPipe | MapDataPipe):
        raise PrepareError(
            f"prepare: the dataset is a data pipe ({type(loader.dataset).__name__}), which torch divides among "
            "processes in its own way; use a Dataset or an IterableDataset"
        )
