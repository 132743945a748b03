"""How the processes agree about a checkpoint: on a group of their own, so that training is not disturbed."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ...errors import AccelError, CheckpointError
from .. import collectives
from ..world import World

T = TypeVar("T")
U = TypeVar("U")

SHORT = 4000
"""Bytes of a message that is sent without asking first how long it is."""


class Exchange:
    """Messages among all processes over the host's network, also from another thread than the training's."""

    def __init__(self, world: World, timeout: float) -> None:
        self.world, self.timeout = world, timeout
        self._group: ProcessGroup | None = None

    def connect(self) -> None:
        """Make the group, once; all ranks, in the main thread."""
        if self._group is None and self.world.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))

    def gather(self, value: T) -> list[T]:
        """What each rank has, by rank; all ranks. Raises CheckpointError if a process is gone.

        In one message if it is short on all ranks, where torch's function of this kind needs two.
        """
        if self._group is None:
            return [value]
        data = pickle.dumps(value)
        with _losing():
            firsts = _gather_rows(len(data).to_bytes(8, "little") + data[:SHORT], 8 + SHORT, self._group)
            sizes = [int.from_bytes(first[:8], "little") for first in firsts]
            left = max(sizes) - SHORT
            rests = _gather_rows(data[SHORT:], left, self._group) if left > 0 else [b""] * len(sizes)
        return [pickle.loads(first[8:] + rest) for first, rest in zip(firsts, rests, strict=True)]

    def together(self, act: Callable[[], T], failure: type[CheckpointError] = CheckpointError) -> list[T]:
        """Let each rank act, and return every rank's result, which can be pickled; all ranks.

        If any of them fails, all raise `failure` with what went wrong where: nobody waits for who has failed.
        """
        return self.tell(act, lambda result: result, failure)[1]

    def each(self, act: Callable[[], T]) -> T:
        """Let each rank act, and return its own result; all ranks. Errors as in `together`."""
        return self.tell(act, lambda result: None)[0]

    def from_main(self, act: Callable[[], T], failure: type[CheckpointError] = CheckpointError) -> T:
        """Let rank 0 act, and return its result on all ranks; errors as in `together`."""
        attempt = _attempt(act) if self.world.rank == 0 else None
        with _losing():
            own = (attempt.result, attempt.failure) if attempt else ([], "")
            results, text = collectives.broadcast_object(own, self._group)
        if text:
            raise failure(text) from (attempt.cause if attempt else None)
        return results[0]

    def fill(self, state: dict[str, Any]) -> None:
        """Replace tensors on the meta device by CPU copies of those of the first process that has them; all ranks."""
        holders = self.gather(
            {name for name, value in state.items() if isinstance(value, Tensor) and not value.is_meta}
        )
        for name, value in state.items():
            having = [rank for rank, names in enumerate(holders) if name in names]
            if having and len(having) < len(holders):
                state[name] = torch.empty_like(value, device="cpu") if value.is_meta else value
                dist.broadcast(state[name], group=self._group, group_src=having[0])

    def tell(
        self, act: Callable[[], T], told: Callable[[T], U], kind: type[CheckpointError] = CheckpointError
    ) -> tuple[T, list[U]]:
        """Let each rank act, and return its own result and what each rank tells of its own; else as `together`."""
        attempt = _attempt(act)
        return _settle(attempt, self.gather(_telling(attempt, told)), kind)

    def tell_while(
        self, act: Callable[[], T], told: Callable[[T], U], meanwhile: Callable[[T], object]
    ) -> tuple[T, list[U]]:
        """As `tell`, and do something with the own result while the messages are under way; not while Python ends."""
        attempt = _attempt(act)
        with ThreadPoolExecutor(1) as pool:
            outcomes = pool.submit(self.gather, _telling(attempt, told))
            for result in attempt.result:
                meanwhile(result)
        return _settle(attempt, outcomes.result(), CheckpointError)


def _gather_rows(data: bytes, size: int, group: ProcessGroup) -> list[bytes]:
    """What each rank has, filled up with zeros to so many bytes."""
    row = torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)
    rows = [torch.empty_like(row) for _ in range(group.size())]
    dist.all_gather(rows, row, group=group)
    return [row.numpy().tobytes() for row in rows]


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """What came of it: one result, or none and why."""

    result: list[T]
    failure: str = ""
    cause: Exception | None = None


def _attempt(act: Callable[[], T]) -> Attempt[T]:
    try:
        return Attempt([act()])
    except Exception as error:  # noqa: BLE001 - it is raised on all ranks
        known = isinstance(error, AccelError)
        return Attempt([], str(error) if known else f"{type(error).__name__}: {error}", error)


def _telling(attempt: Attempt[T], told: Callable[[T], U]) -> tuple[list[U], str]:
    return [told(result) for result in attempt.result], attempt.failure


def _settle(attempt: Attempt[T], outcomes: list[tuple[list[U], str]], kind: type[CheckpointError]) -> tuple[T, list[U]]:
    """The own result and what each rank told; raises what went wrong on any."""
    failures = {rank: text for rank, (_, text) in enumerate(outcomes) if text}
    if not failures:
        return attempt.result[0], [value for values, _ in outcomes for value in values]
    if len(set(failures.values())) == 1:
        raise kind(next(iter(failures.values()))) from attempt.cause
    raise kind("; ".join(f"rank {rank}: {text}" for rank, text in failures.items())) from attempt.cause


@contextmanager
def _losing() -> Iterator[None]:
    """Say what it means if the others cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        raise CheckpointError(f"a process was lost before the checkpoint was complete: {error}") from error
