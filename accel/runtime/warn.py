"""Warnings that show the user's line, through however many of ours it came."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

OURS = __name__.partition(".")[0]


def warn(text: str) -> None:
    """Warn at the innermost line that is not of this library; whoever should calls it, such as the main process."""
    level, frame = 1, sys._getframe()
    while frame.f_back and _is_ours(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def _is_ours(frame: FrameType) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0] == OURS
