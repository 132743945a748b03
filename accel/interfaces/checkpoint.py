"""The interface of a checkpoint format: which files hold which tensors, and where in them the bytes are.

A format moves no bytes. It says where whole tensors lie, and the core lets every process write and read its own
parts there, in parallel, with checksums, in any layout over any number of processes. Nothing here needs torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = 4096
"""Where memory, disk and page cache begin a page: what begins there is read and written faster."""


@dataclass(frozen=True)
class Entry:
    """A whole tensor: its name, its dtype as torch names it (`float32`), and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a whole tensor lies, in row-major order: `size` bytes of a file from byte `offset`."""

    entry: Entry
    file: str
    offset: int
    size: int


@dataclass(frozen=True)
class File:
    """A file to be written: its first bytes, and the tensors that fill the rest."""

    name: str
    head: bytes
    size: int
    places: tuple[Place, ...] = ()


class Checkpoint(ABC):
    """Says how named groups of tensors (`model`, `optimizer`, ...) lie in the files of a folder."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """The settings of this format, under its name in the config."""

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def layout(self, group: str, entries: Sequence[Entry], max_shard_size: int) -> Sequence[File]:
        """The files of a group; a function of its arguments alone, since every process computes it.

        No file's tensors exceed `max_shard_size` bytes, unless a single one does. Raises CheckpointError naming
        an entry that the format cannot hold.
        """

    @abstractmethod
    def places(self, folder: Path, group: str) -> Mapping[str, Place]:
        """Where the tensors of a group lie in a folder, by name.

        Raises CheckpointError, naming the file, if the group is not there or its files contradict themselves.
        """
