"""The user's lines: what warnings and errors show, through however many of ours they came."""

from __future__ import annotations

import sys
import warnings

from ..registry import is_machinery


def warn(text: str) -> None:
    """Warn at the innermost line of the user's code; whoever should calls it, such as the main process."""
    warnings.warn(text, stacklevel=_depth() + 1)


def users_line() -> str:
    """The innermost line of the user's code that led here, as file:number; empty if none did."""
    frame = sys._getframe(_depth())
    file = frame.f_code.co_filename
    return "" if is_machinery(frame) or file.startswith("<") else f"{file}:{frame.f_lineno}"


def _depth() -> int:
    """How many calls the user's innermost line is above the caller; the outermost line where none is the user's."""
    depth, frame = 0, sys._getframe(1)
    while frame.f_back and is_machinery(frame):
        depth, frame = depth + 1, frame.f_back
    return depth
