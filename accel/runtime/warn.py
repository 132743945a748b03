"""Warnings that show the user's line, through however many of ours it came."""

from __future__ import annotations

import sys
import warnings

from ..registry import is_machinery


def warn(text: str) -> None:
    """Warn at the innermost line of the user's code; whoever should calls it, such as the main process."""
    level, frame = 1, sys._getframe()
    while frame.f_back and is_machinery(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)
