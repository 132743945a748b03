"""The interface of a checkpoint format: bytes on disk, and nothing about what they mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Checkpoint(ABC):
    """Writes and reads named groups of tensors and one mapping of plain values."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """The settings of this format, under its name in the config."""

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def save(self, folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        """Write into an existing empty folder. Called on the main process only.

        `tensors` are whole CPU tensors by group (`model`, `optimizer`, ...) and name; `values` hold what JSON can.
        """

    @abstractmethod
    def load(self, folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Read what `save` wrote. Called by all ranks. Raises CheckpointError if the folder does not hold it."""
