"""The benchmark of checkpoints: every contender does what it says, on one process and on two."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_every_row_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    benchmark = importlib.import_module("checkpoint")
    arguments = ["--megabytes", "3", "--processes", "1", "2", "--rounds", "1", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", *arguments])
    benchmark.main()
    table = capsys.readouterr().out
    for name in ("dd, flushed", "accel save_state", "stall if", "torch.save", "DCP", "accel load_state, page cache"):
        assert table.count(f"  {name}") >= 2, name
    assert "resume, from load_state to the first batch" in table
    assert list(tmp_path.iterdir()) == []
