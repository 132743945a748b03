"""What one stage tells the next about a micro-batch: which parts were called, what they returned, and the tensors."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel import errors

_LIBRARIES = tuple(str(Path(file).parent) for file in (torch.__file__, errors.__file__, __file__))


class Leaf(NamedTuple):
    """A tensor that a part returned; `payload` is its place among those that are sent, None if it is not."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    payload: int | None


class Called(NamedTuple):
    """A call of a part, with what it returned; `everywhere` says whether all micro-batches made it."""

    part: str
    ordinal: int
    skeleton: Any
    leaves: tuple[Leaf, ...]
    everywhere: bool = True


@dataclass
class Message:
    """All calls so far, in order, and the results that later stages need.

    `seed` is of the random numbers that the user's forward draws outside of all parts, alike on all stages.
    """

    seed: int
    calls: list[Called]
    payload: list[Tensor]
    learns: list[bool]
    """Which of the payload gets a gradient."""


@dataclass
class Failure:
    """A stage could not make its message: which, and why."""

    text: str

    @classmethod
    def of(cls, error: Exception, where: str) -> Failure:
        """What to say of an error: where, at which line of the user's, and why."""
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f" at {f.filename}:{f.lineno}" for f in frames if not f.filename.startswith(_LIBRARIES)]
        return cls(f"{where}, failed{lines[-1] if lines else ''}: {type(error).__name__}: {error}")
