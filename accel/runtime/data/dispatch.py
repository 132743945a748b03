"""Batches that one process reads and sends to the others, for data that only it can reach or that cannot be divided."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ...errors import PrepareError
from ..points import BATCH, Points
from .read import Batches


@dataclass(frozen=True)
class _Failure:
    """Sent instead of a batch when reading failed, so that no process waits for ever."""

    message: str


def dispatched(batches: Iterator[Batches] | None, group: dist.ProcessGroup) -> Iterator[Batches]:
    """This process's batches out of those that the first process of the group reads; all processes iterate alike.

    `batches` is what the first process reads, for all places; None on the others. An error in reading is raised on
    all: as it is on the first process, as PrepareError on the others.
    """
    points = Points.of(group)
    while True:
        points.come_to(BATCH)
        received: list[Any] = [b""]
        sent = None if batches is None else _parcels(batches, group)
        dist.scatter_object_list(received, sent, group=group, group_src=0)
        parcel = pickle.loads(received[0])
        if isinstance(parcel, _Failure):
            raise PrepareError(f"the main process could not read the next batch: {parcel.message}")
        if parcel is None:
            return
        share, batch = parcel
        if batch is not None:
            yield share, [batch]


def _parcels(batches: Iterator[Batches], group: dist.ProcessGroup) -> list[bytes]:
    """What each process gets next; pickled here, so that a batch that cannot be sent is an error like any other."""
    size = dist.get_world_size(group)
    try:
        item = next(batches, None)
        if item is None:
            return [pickle.dumps(None)] * size
        return [pickle.dumps((item[0], batch)) for batch in item[1]]
    except Exception as error:
        failure = pickle.dumps(_Failure(f"{type(error).__name__}: {error}"))
        dist.scatter_object_list([None], [failure] * size, group=group, group_src=0)
        raise
