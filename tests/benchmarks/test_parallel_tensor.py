"""The benchmark of tensor parallelism: both train alike, and send what the formula says."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("parallel_tensor")


def test_formula(benchmark: Any) -> None:
    """One number: two blocks x four exchanges, embedding and head; each of two processes sends it to the other.

    Divided, instead of three logits: three numbers of a position and five norms of two, there and back, and a place.
    """
    shape = benchmark.Shape(width=1, layers=2, heads=1, vocabulary=3, length=1, batch=1)
    assert benchmark.formula(shape, 2, divided=False) == 4 * (2 * 10 + 3)
    assert benchmark.formula(shape, 2, divided=True) == 4 * (2 * 10 + 2 * 3 + 2 * 10 + 1)
    assert benchmark.formula(shape, 4, divided=False) == 3 * benchmark.formula(shape, 2, divided=False)


@pytest.mark.slow
def test_both_train_alike(benchmark: Any) -> None:
    shape = benchmark.Shape(width=128, layers=2, heads=4, vocabulary=512, length=64, batch=4)
    network = benchmark.own_network()
    found = {name: benchmark.measure(name, 2, shape, 2, network)[0] for name in benchmark.CONTENDERS}
    assert found["accel"]["losses"] == pytest.approx(found["torch"]["losses"], rel=1e-6)
    assert found["accel"]["sent"] < 1.02 * found["torch"]["sent"]
    assert found["accel"]["stored"] < 1.05 * found["torch"]["stored"]
