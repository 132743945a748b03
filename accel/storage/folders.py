"""Where checkpoints are: the names that are given by themselves, which is the newest, which are to be deleted."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import CheckpointError
from .commit import doom, older, sweep
from .files import naming
from .manifest import Manifest, read_manifest

FOLDER = "checkpoints"
"""The folder under `project_dir` in which checkpoints without a name of the user's are kept."""


def absolute(folder: str | os.PathLike[str]) -> Path:
    """A folder's full name, links followed: it means the same in a thread that works while the process goes elsewhere.

    Raises CheckpointError.
    """
    with naming(Path(folder), "found"):
        full = Path(os.path.realpath(folder))
    if not full.name:
        raise CheckpointError(f"{full}: the top folder cannot be a checkpoint; name one inside")
    return full


def named(home: Path) -> dict[int, Path]:
    """The checkpoints of a folder that have numbered names, `checkpoint_<n>`, by number, lowest first."""
    if not home.is_dir():
        return {}
    found = {_number(path.name): path for path in home.iterdir()}
    found |= {n: home / f"checkpoint_{n}" for path in home.iterdir() if (n := _number(path.name, r"\.{}\.older")) >= 0}
    return {number: found[number] for number in sorted(found) if number >= 0}


def next_folder(home: Path) -> Path:
    """The name after the highest."""
    return home / f"checkpoint_{max(named(home), default=-1) + 1}"


def newest_first(home: Path) -> list[Path]:
    """The numbered checkpoints, newest first."""
    return list(reversed(named(home).values()))


def find(folder: Path) -> Path:
    """Where a checkpoint of this name is: itself, or what a killed replacement left. Raises CheckpointError."""
    for candidate in (folder, older(folder)):
        if candidate.is_dir():
            return candidate
    if folder.exists():
        raise CheckpointError(f"{folder}: this is a file, and a checkpoint is a folder")
    raise CheckpointError(f"{folder}: no such checkpoint; save_state({str(folder)!r}) writes it")


def complete(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there. Raises CheckpointError."""
    manifest = read_manifest(folder)
    if problems := manifest.quick_problems(folder):
        raise CheckpointError(f"{folder / problems[0].file}: damaged: {problems[0].reason}")
    return manifest


def rotate(home: Path, limit: int) -> list[Path]:
    """Take away the names of all but the newest `limit` complete checkpoints; unfinished ones are let be.

    Returns what is to be deleted, oldest first. Raises CheckpointError.
    """
    sweep(home)
    whole = [path for path in newest_first(home) if path.is_dir() and _is_complete(path)]
    return [doom(path) for path in reversed(whole[limit:])]


def _is_complete(folder: Path) -> bool:
    try:
        complete(folder)
    except CheckpointError:
        return False
    return True


def _number(name: str, pattern: str = "{}") -> int:
    match = re.fullmatch(pattern.format(r"checkpoint_(\d+)"), name)
    return int(match[1]) if match else -1


def parse_size(size: int | str) -> int:
    """Bytes of `5GB`, `500 MB`, `1GiB` or a plain number. Raises CheckpointError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(size).strip(), re.IGNORECASE)
    if match is None or not (found := int(float(match[1]) * _unit(match[2], match[3]))):
        raise CheckpointError(f"max_shard_size: expected bytes, or text as '5GB', got {size!r}")
    return found


def _unit(prefix: str, binary: str) -> int:
    power = "KMGT".find(prefix.upper()) + 1 if prefix else 0
    return int((1024 if binary else 1000) ** power)
