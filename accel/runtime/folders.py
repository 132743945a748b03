"""Checkpoints that nobody named: `checkpoint_0`, `checkpoint_1`, ... in the run's folder."""

from __future__ import annotations

from pathlib import Path

_NAME = "checkpoint_"


def newest(home: Path) -> Path | None:
    """The last complete checkpoint in a folder; None if it holds none, or does not exist."""
    numbers = _numbers(home)
    return home / f"{_NAME}{max(numbers)}" if numbers else None


def following(home: Path) -> Path:
    """Where the next checkpoint goes."""
    return home / f"{_NAME}{max(_numbers(home), default=-1) + 1}"


def _numbers(home: Path) -> list[int]:
    names = [path.name.removeprefix(_NAME) for path in home.glob(f"{_NAME}*")]
    return [int(name) for name in names if name.isdecimal()]
