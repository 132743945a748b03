"""Metrics as text: one JSON object per line, in one file per run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from accel.errors import AccelError, ConfigError
from accel.interfaces import Tracker


class JSONL(Tracker):
    """Writes each log call as one line of JSON to `<run>.jsonl`, complete on disk when the call returns."""

    @dataclass(frozen=True, kw_only=True)
    class Options(Tracker.Options):
        """The settings of `jsonl`."""

        append: bool = True
        """Continue the file of an earlier run of the same name, rather than start it again."""

    def __init__(self, options: Options, folder: Path) -> None:
        super().__init__(options, folder)
        self._file: TextIOWrapper | None = None

    def start(self, run: str, settings: Mapping[str, Any]) -> None:
        """Open `<folder>/<run>.jsonl` and write `{"run": ..., "time": ..., "settings": {...}}`.

        Raises ConfigError for a name that cannot be a file's.
        """
        if not run or Path(run).name != run:
            raise ConfigError(f"run name: must be usable as a file name, got {run!r}")
        self.finish()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{run}.jsonl"
        self._file = path.open("a" if self.options.append else "w", encoding="utf-8", buffering=1)
        self._write({"run": run, "time": time.time(), "settings": settings})

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Write `{"step": ..., "time": ..., "values": {...}}`.

        NaN and the infinities, which JSON lacks, become the strings `nan`, `inf` and `-inf`.
        """
        self._write({"step": step, "time": time.time(), "values": values})

    def finish(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is None:
            raise AccelError("jsonl: nothing can be logged before the run is started")
        line = json.dumps({key: _plain(value, key) for key, value in record.items()}, allow_nan=False)
        self._file.write(line + "\n")


def _plain(value: Any, path: str) -> Any:
    """`value` as strict JSON can hold it; raises AccelError naming the path of what cannot be written."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "tolist"):  # tensors and arrays, of any shape
        return _plain(value.tolist(), path)
    raise AccelError(
        f"jsonl: {path} is {type(value).__name__} {value!r:.60}, which JSON cannot hold; "
        "log numbers, text, tensors, lists or mappings"
    )
