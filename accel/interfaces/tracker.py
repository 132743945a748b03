"""The interface of a tracker: where metrics go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Tracker:
    """Forgets everything; a plugin overrides what it changes. All methods are called on the main process only."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """The settings of this tracker, under its name in the config."""

    def __init__(self, options: Any, folder: Path) -> None:
        self.options, self.folder = options, folder

    def start(self, run: str, settings: Mapping[str, Any]) -> None:
        """Begin a run of this name with these hyper-parameters."""

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Record values at a step."""

    def finish(self) -> None:
        """End the run; nothing is logged after this."""
