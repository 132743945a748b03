"""The manifest of a checkpoint: its files, their sizes, and checksums of every byte that they hold.

It is written last, when everything else is on disk, so a folder without one was never finished.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .disk import CHUNK, Checksum, Range, Reader, Writer, checksum

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Problem:
    """What is wrong with a checkpoint: the file, the tensor if one can be told, and why."""

    file: str
    tensor: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {f'{self.tensor}: ' if self.tensor else ''}{self.reason}"


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint consists of. `facts` are for people: step, time, number of processes."""

    sizes: Mapping[str, int]
    ranges: Sequence[Range]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())

    def write(self, folder: Path) -> None:
        """Write `manifest.json` and wait until it is on disk. Raises CheckpointError."""
        files: dict[str, Any] = {name: {"size": size, "ranges": []} for name, size in self.sizes.items()}
        for r in sorted(self.ranges, key=lambda r: (r.file, r.offset)):
            repeats = [r.count, r.stride] if r.count != 1 else []
            files[r.file]["ranges"].append([r.offset, r.size, r.checksum, r.tensor, *repeats])
        content: dict[str, Any] = {"format": FORMAT, "complete": True, **self.facts, "files": files}
        content["checksum"] = checksum(_canonical(content))
        data = _readable(content).encode()
        with Writer(folder) as writer:
            writer.create(MANIFEST, len(data), data)
            writer.flush()

    def quick_problems(self, folder: Path) -> list[Problem]:
        """Files that are missing or have another size; reads no byte of them."""
        found = []
        for name, size in self.sizes.items():
            try:
                actual = os.stat(folder / name).st_size
            except OSError as error:
                found.append(Problem(name, "", "missing" if isinstance(error, FileNotFoundError) else str(error)))
                continue
            if actual != size:
                found.append(Problem(name, "", f"holds {actual} bytes instead of {size}"))
        return found

    def problems(self, folder: Path, share: int = 0, shares: int = 1) -> Iterator[Problem]:
        """Read one of several equal shares of all bytes, and tell where they are not what was written."""
        with Reader(folder) as reader:
            for r in self._share(share, shares):
                if problem := check(reader, r):
                    yield problem

    def _share(self, share: int, shares: int) -> Iterator[Range]:
        total = sum(r.total for r in self.ranges)
        before = 0
        for r in self.ranges:
            if before * shares // max(total, 1) == share:
                yield r
            before += r.total


def check(reader: Reader, r: Range, memory: memoryview | None = None) -> Problem | None:
    """Read a range and compare it with its checksum; into memory of its size, or only to look at it."""
    digest, done = Checksum(), 0
    try:
        for run in r.stretches(CHUNK):
            reader.scan(r.file, run, digest.update, memory and memory[done : done + run.size])
            done += run.size
    except CheckpointError as error:
        return Problem(r.file, r.tensor, str(error.__cause__ or "ends too early"))
    if digest.hexdigest() != r.checksum:
        return Problem(r.file, r.tensor, f"damaged: wrong checksum between bytes {_span(r)}")
    return None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises CheckpointError if the folder has none, or a damaged one."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        expected = content.pop("checksum")
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path}: written in format {content['format']!r}; this version reads {FORMAT}")
        if checksum(_canonical(content)) != expected:
            raise ValueError("wrong checksum")
        files = content.pop("files")
        ranges = [_range(name, *values) for name in files for values in files[name]["ranges"]]
        facts = {name: value for name, value in content.items() if name not in ("format", "complete")}
        return Manifest({name: facts["size"] for name, facts in files.items()}, ranges, facts)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder}: not a complete checkpoint: there is no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged: {type(error).__name__}: {error}") from error


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _readable(content: Mapping[str, Any]) -> str:
    """One line for each fact, file and range: short, and still a pleasure to look at."""
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items() if name != "files"]
    files = []
    for name, facts in content["files"].items():
        ranges = ",\n   ".join(json.dumps(r) for r in facts["ranges"])
        files.append(f'{json.dumps(name)}: {{"size": {facts["size"]}, "ranges": [\n   {ranges}]}}')
    return "{" + ",\n ".join([*lines, '"files": {\n  ' + ",\n  ".join(files) + "}"]) + "}\n"


def _range(file: str, offset: int, size: int, checksum: str, tensor: str, count: int = 1, stride: int = 0) -> Range:
    return Range(offset, size, count, stride, file, checksum, tensor)


def _span(r: Range) -> str:
    return f"{r.offset} and {r.offset + (r.count - 1) * r.stride + r.size}"
