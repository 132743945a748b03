"""A folder appears whole or not at all: it is made under another name, and renamed when everything is on disk."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError
from .files import flush_folder, naming
from .lock import lock, unlock
from .manifest import read_manifest

SHARDS = r"(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
OURS = re.compile(rf"(model|optimizer|state)(_\d+)?{SHARDS}|state\.json|manifest\.json")
"""Names of the files of checkpoints, also of older ones: none of them may stand beside a newer checkpoint's."""


def aside(folder: Path) -> Path:
    """Where a folder is made before it gets its name."""
    return folder.with_name(f".{folder.name}.writing")


def older(folder: Path) -> Path:
    """Where the folder that is being replaced is kept until the new one has its name."""
    return folder.with_name(f".{folder.name}.older")


@contextmanager
def made_aside(folder: Path) -> Iterator[None]:
    """Begin a folder that no other run touches meanwhile; what the block does not commit is deleted if it fails.

    What a killed attempt may have left of it is deleted first. Raises CheckpointError.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: cannot be written: there is a file of this name")
    if _is_used(folder):
        raise CheckpointError(
            f"{folder}: cannot be written: it is replaced as a whole, and the script runs in it; name a folder inside"
        )
    with naming(aside(folder), "written"):
        handle = _open_aside(folder)
    try:
        yield
    except Exception:
        discard(folder)
        raise
    finally:
        unlock(handle)


def _open_aside(folder: Path) -> int:
    path = aside(folder)
    if path.exists():
        handle = lock(path)
        try:
            shutil.rmtree(path)
        finally:
            unlock(handle)
    path.mkdir(parents=True)
    return lock(path)


def _is_used(folder: Path) -> bool:
    """Whether this process's working folder is this one or lies in it."""
    try:
        return Path(os.getcwd()).is_relative_to(folder)
    except FileNotFoundError:  # it has been deleted
        return False


def commit(folder: Path) -> list[Path]:
    """Give the finished folder its name. Raises CheckpointError, and then the one that had the name still has it.

    Returns where the one is now that had it, if any, for `clear`. If killed between the two renames of a replacement,
    the old one is found under its second name. What others have put into the old one is also in the new one.
    """
    with naming(folder, "written"):
        replaces = folder.exists()
        if replaces:
            _keep_others(folder)
        flush_folder(aside(folder))
        if replaces:
            clear([older(folder), doomed(folder)])  # what killed processes have left
            folder.rename(older(folder))
        try:
            aside(folder).rename(folder)
        except OSError:
            if replaces:
                older(folder).rename(folder)
            raise
        flush_folder(folder.parent)
    if not replaces:
        return []
    try:
        return [older(folder).rename(doomed(folder))]  # so that it is never found half deleted
    except OSError:  # what killed processes have left is still there
        return [older(folder)]


def clear(folders: Iterable[Path]) -> None:
    """Delete what was replaced; what cannot be deleted, as somebody reads it, goes the next time."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _keep_others(folder: Path) -> None:
    """Give files that are no part of the old checkpoint a second name in the new one, which costs no copy."""
    top, known = os.fspath(folder), set(os.listdir(aside(folder)))
    with suppress(CheckpointError):  # of a folder without a manifest, names must do
        known.update(read_manifest(folder).sizes)

    def ours(path: str, names: list[str]) -> set[str]:
        return {name for name in names if name in known or OURS.fullmatch(name)} if path == top else set()

    shutil.copytree(top, aside(folder), symlinks=True, ignore=ours, copy_function=os.link, dirs_exist_ok=True)


def commit_files(folder: Path, made: Path, group: str) -> None:
    """Move the finished files of one group into a folder that may hold others, over those of before.

    The index goes last, and files of the group that are not part of it any more go away. Raises CheckpointError.
    """
    with naming(folder, "written"):
        new = sorted(aside(made).iterdir(), key=lambda path: (path.name.endswith(".index.json"), path.name))
        for path in new:
            path.rename(folder / path.name)
        names = {path.name for path in new}
        for path in folder.glob(f"{group}*.safetensors*"):
            if path.name not in names and re.fullmatch(rf"{group}{SHARDS}", path.name):
                path.unlink()
        aside(made).rmdir()
        flush_folder(folder)


def discard(folder: Path) -> None:
    """Give up an unfinished folder; what cannot be deleted is deleted by the next attempt."""
    shutil.rmtree(aside(folder), ignore_errors=True)


def doomed(folder: Path) -> Path:
    """Where a folder is while it is deleted."""
    return folder.with_name(f".{folder.name}.deleting")


def sweep(home: Path) -> None:
    """Delete what killed deletions have left in a folder. Raises CheckpointError."""
    with naming(home, "cleared"):
        for path in home.glob(doomed(home / "checkpoint_*").name):
            shutil.rmtree(path)


def remove(folder: Path) -> None:
    """Delete a checkpoint so that it is never found half deleted. Raises CheckpointError."""
    delete([doom(folder)])


def doom(folder: Path) -> Path:
    """Take a checkpoint's name away; returns the one by which it is to be deleted. Raises CheckpointError."""
    with naming(folder, "deleted"):
        if doomed(folder).exists():
            shutil.rmtree(doomed(folder))
        folder.rename(doomed(folder))
    return doomed(folder)


def delete(folders: Iterable[Path]) -> None:
    """Delete folders one after another. Raises CheckpointError."""
    for folder in folders:
        with naming(folder, "deleted"):
            folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)  # a link's folder is not ours
