"""Aligned columns for the terminal."""

from __future__ import annotations

import shutil
from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Rows of text as lines with aligned columns. On a terminal the last column is cut to the terminal's width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] if rows else []
    lines = (
        indent + "  ".join([*(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def shorten(line: str, isatty: bool) -> str:
    """A line that fits the terminal, if there is one."""
    width = shutil.get_terminal_size().columns
    return line if not isatty or len(line) <= width else line[: width - 1] + "…"
