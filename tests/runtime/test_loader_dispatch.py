"""One process reads and sends the others their part: real processes, because the point is what passes between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from accel.config import Config
from accel.errors import PrepareError
from accel.runtime.loader import PreparedLoader
from accel.testing import run

from .loaders import Numbers, Step, Stream, flat, steps


class Unreachable(Numbers):
    """Can be read by the main process only."""

    def __getitem__(self, index: int) -> int:
        if dist.get_rank() != 0:
            raise AssertionError("only the main process reads")
        return index


class Failing(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield from range(4)
        raise OSError("the disk is gone")


def unsendable(samples: list[int]) -> Any:
    return lambda: samples


def make(kind: str) -> DataLoader[Any]:
    if kind == "stream":
        return DataLoader(Stream(11), 2)
    if kind == "workers":
        return DataLoader(Stream(11), 2, num_workers=2)
    if kind == "failing":
        return DataLoader(Failing(), 1)
    if kind == "unsendable":
        return DataLoader(Numbers(4), 1, collate_fn=unsendable)
    return DataLoader(Unreachable(0 if kind == "empty" else 11), 2, shuffle=kind == "shuffle")


def epochs(kind: str, even: bool) -> list[list[Step]]:
    """Two epochs of this rank."""
    dist.init_process_group("gloo")
    try:
        config = Config().replace(dispatch_batches=True, even_batches=even)
        loader = PreparedLoader(
            make(kind),
            size=dist.get_world_size(),
            index=dist.get_rank(),
            config=config,
            group=lambda: dist.group.WORLD,
        )
        return [steps(loader) for _ in range(2)]
    finally:
        dist.destroy_process_group()


def alone(kind: str, size: int, even: bool) -> list[list[list[Step]]]:
    """What each rank would have read by itself."""
    config = Config().replace(even_batches=even)

    class Readable(Numbers):
        pass

    def loader() -> DataLoader[Any]:
        if kind in ("stream", "workers"):
            return make(kind)
        return DataLoader(Readable(0 if kind == "empty" else 11), 2, shuffle=kind == "shuffle")

    loaders = [PreparedLoader(loader(), size=size, index=rank, config=config) for rank in range(size)]
    return [[steps(each) for _ in range(2)] for each in loaders]


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("kind", ["map", "shuffle", "stream", "workers", "empty"])
def test_each_process_gets_what_it_would_have_read(kind: str, even: bool) -> None:
    found = run(2, epochs, kind, even)
    assert [[[(s.batch, s.counts) for s in e] for e in rank] for rank in found] == [
        [[(s.batch, s.counts) for s in e] for e in rank] for rank in alone(kind, 2, even)
    ]
    if even:
        assert found == alone(kind, 2, even)


def test_three_processes_of_which_one_has_no_sample() -> None:
    found = run(3, epochs, "stream", True)
    assert [rank[0][-1].counts for rank in found] == [(2, 2, 1)] * 3
    assert sorted(flat([s.batch[: s.counts[i]] for i, rank in enumerate(found) for s in rank[0]])) == list(range(11))


def failure(kind: str) -> str:
    try:
        epochs(kind, True)
    except (OSError, PrepareError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def test_an_error_in_reading_is_raised_on_all() -> None:
    assert run(2, failure, "failing") == [
        "OSError: the disk is gone",
        "PrepareError: the main process could not read the next batch: OSError: the disk is gone",
    ]


def test_a_batch_that_cannot_be_sent_is_an_error_on_all() -> None:
    first, second = run(2, failure, "unsendable")
    assert "pickle" in first and second.startswith("PrepareError: the main process could not read the next batch")


def test_one_process_reads_for_itself() -> None:
    loader = PreparedLoader(DataLoader(Numbers(4), 2), config=Config().replace(dispatch_batches=True))
    assert [step.batch for step in steps(loader)] == [[0, 1], [2, 3]]
