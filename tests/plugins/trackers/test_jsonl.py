"""`trackers: jsonl`: one JSON object per line, complete as soon as it is logged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accel import registry
from accel.errors import AccelError, ConfigError
from accel.interfaces import Tracker


def make(folder: Path, **options: Any) -> Tracker:
    plugin = registry.load("tracker", "jsonl")
    return plugin(plugin.Options(**options), folder)


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[Tracker]:
    tracker = make(tmp_path / "logs")
    yield tracker
    tracker.finish()


def lines(folder: Path, run: str = "digits") -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    text = (folder / "logs" / f"{run}.jsonl").read_text("utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_each_call_is_a_line_at_once(tracker: Tracker, tmp_path: Path) -> None:
    tracker.start("digits", {"lr": 0.1, "layers": [1, 2]})
    tracker.log({"loss": 0.5, "note": "two\nlines"}, step=3)
    first, second = lines(tmp_path)
    assert (first["run"], first["settings"]) == ("digits", {"lr": 0.1, "layers": [1, 2]})
    assert (second["step"], second["values"]) == (3, {"loss": 0.5, "note": "two\nlines"})
    assert first["time"] <= second["time"]
    tracker.log({"loss": 0.25})
    assert lines(tmp_path)[2]["values"] == {"loss": 0.25}
    assert lines(tmp_path)[2]["step"] is None


def test_tensors_arrays_and_numbers_that_json_lacks(tracker: Tracker, tmp_path: Path) -> None:
    tracker.start("digits", {"folder": None})
    values = {
        "a": torch.tensor(1.5),
        "b": np.float32(0.25),
        "c": np.arange(3),
        "d": math.nan,
        "e": (math.inf, -math.inf),
    }
    tracker.log(values, step=0)
    assert lines(tmp_path)[1]["values"] == {"a": 1.5, "b": 0.25, "c": [0, 1, 2], "d": "nan", "e": ["inf", "-inf"]}


def test_a_second_run_of_the_same_name_continues(tracker: Tracker, tmp_path: Path) -> None:
    tracker.start("digits", {})
    tracker.log({"loss": 1.0}, 0)
    tracker.finish()
    tracker.start("digits", {})
    tracker.log({"loss": 0.5}, 1)
    assert [line.get("step") for line in lines(tmp_path)] == [None, 0, None, 1]


def test_a_second_run_can_start_again(tmp_path: Path) -> None:
    for _ in range(2):
        tracker = make(tmp_path / "logs", append=False)
        tracker.start("digits", {})
        tracker.log({"loss": 1.0}, 0)
        tracker.finish()
    assert len(lines(tmp_path)) == 2


def test_what_json_cannot_hold_is_named(tracker: Tracker) -> None:
    tracker.start("digits", {})
    with pytest.raises(AccelError, match=r"values\.images\[0\] is object .*; log numbers, text"):
        tracker.log({"images": [object()]})


@pytest.mark.parametrize("run", ["", "a/b", "../a"])
def test_run_names_are_file_names(tracker: Tracker, run: str) -> None:
    with pytest.raises(ConfigError, match="run name: must be usable as a file name"):
        tracker.start(run, {})


def test_nothing_is_logged_outside_a_run(tracker: Tracker) -> None:
    with pytest.raises(AccelError, match="before the run is started"):
        tracker.log({"loss": 1.0})
    tracker.finish()
    tracker.finish()
