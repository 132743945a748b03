"""`accel checkpoints`: what is on disk, whether it is whole, and a way to be rid of it. Needs no torch."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from .. import storage
from ..config import resolve
from ..errors import CheckpointError
from .table import columns

HELP = "List, verify and delete checkpoints."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their folders."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    ls = actions.add_parser("ls", help="show step, size, age and health of every checkpoint", allow_abbrev=False)
    ls.add_argument("folder", nargs="?", type=Path, help="where they are (default: project_dir/checkpoints)")
    verify = actions.add_parser("verify", help="read every byte and compare checksums", allow_abbrev=False)
    verify.add_argument("checkpoint", nargs="+", type=Path, help="a checkpoint's folder, or one that holds several")
    rm = actions.add_parser("rm", help="delete checkpoints", allow_abbrev=False)
    rm.add_argument("checkpoint", nargs="+", type=Path, help="a checkpoint's folder")


def run(options: argparse.Namespace) -> int:
    """Do what is asked; the exit code is 1 if a checkpoint is not whole."""
    if options.action == "ls":
        return _list(options.folder)
    if options.action == "verify":
        return _verify([found for given in options.checkpoint for found in _checkpoints(given)])
    for folder in options.checkpoint:
        _remove(folder.absolute())
    return 0


def _list(folder: Path | None) -> int:
    folder = folder or Path(resolve(None).config.project_dir, storage.FOLDER)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; save_state() without a name of yours makes it")
    rows = [_row(path) for path in _checkpoints(folder)]
    if not rows:
        print(f"{folder}: no checkpoints")
        return 0
    print(columns([("NAME", "STEP", "SIZE", "SAVED", "HEALTH"), *rows]))
    return int(any(row[-1] != "complete" for row in rows))


def _row(path: Path) -> tuple[str, ...]:
    """What can be told without reading the data."""
    try:
        manifest = storage.complete(path)
    except CheckpointError as error:
        return path.name, "-", "-", "-", str(error).removeprefix(f"{path}: ").removeprefix(f"{path}/")
    saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(manifest.facts.get("created", 0)))
    return path.name, str(manifest.facts.get("step", "-")), _readable(manifest.size), saved, "complete"


def _verify(folders: Sequence[Path]) -> int:
    bad = 0
    for folder in folders:
        try:
            manifest = storage.complete(folder)
            problems = [str(problem) for problem in manifest.problems(folder)]
        except CheckpointError as error:
            problems = [str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder}/")]
        bad += bool(problems)
        for problem in problems:
            print(f"{folder}: {problem}")
        if not problems:
            print(f"{folder}: whole, {_readable(manifest.size)} read")
    return int(bad > 0)


def _remove(folder: Path) -> None:
    """Delete a folder that is a checkpoint, whole or not; raises CheckpointError for any other."""
    known = (storage.MANIFEST, "state.json")
    if not folder.is_dir() or not (any((folder / name).exists() for name in known) or _is_numbered(folder)):
        raise CheckpointError(f"{folder}: not a checkpoint; `accel checkpoints ls {folder.parent}` shows what there is")
    storage.remove(folder)
    print(f"{folder}: deleted")


def _is_numbered(folder: Path) -> bool:
    return folder in storage.named(folder.parent).values()


def _checkpoints(folder: Path) -> list[Path]:
    """The folder itself if it is a checkpoint, else those in it: the numbered ones first, then others by name."""
    if (folder / storage.MANIFEST).exists() or not folder.is_dir() or _is_numbered(folder):
        return [folder]
    numbered = list(storage.named(folder).values())
    others = [path.parent for path in folder.glob(f"*/{storage.MANIFEST}")]
    return numbered + sorted(path for path in others if path not in numbered and not path.name.startswith("."))


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
