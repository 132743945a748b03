"""Random augmentation that goes on where it was: each sample's random numbers are a function of its place in the epoch.

Workers start anew when a run is resumed, and which of them reads a sample depends on how many there are. So a worker's
generators begin again at each sample, from a seed that comes with the index: the numbers are the same whoever reads
it, after whatever. Generators that a dataset keeps for itself are not known here, and are let be.
"""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from torch.utils.data import Dataset


class Seeded(Dataset[Any]):
    """A dataset read by (seed, index)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, item: tuple[int, Any]) -> Any:
        seed, index = item
        _seed(seed)
        return self.dataset[index]


class SeededInBulk(Seeded):
    """One that reads a batch at a time, which has the seed of its first sample."""

    def __getitems__(self, items: list[tuple[int, Any]]) -> Any:
        _seed(items[0][0])
        return self.dataset.__getitems__([index for _, index in items])


def seeded(dataset: Any) -> Seeded:
    """The dataset as its workers read it."""
    bulk = getattr(dataset, "__getitems__", None)  # torch asks so, too
    return SeededInBulk(dataset) if bulk else Seeded(dataset)


def _seed(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    torch.default_generator.manual_seed(seed)
