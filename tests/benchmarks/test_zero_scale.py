"""The simulation of many processes: it finds what real ones store and send, and adds layers rightly."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from accel import Accelerator
from accel.testing import run

FOLDER = Path(__file__).parents[2] / "benchmarks"
SIZES = {"width": 128, "layers": 5, "heads": 4, "vocabulary": 512, "length": 16, "batch": 2}
"""Large enough for blocks to be found: each has more than `minimum_size` parameters."""


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("zero_scale")


def train_really(replicas: int) -> tuple[float, float]:
    """Bytes that this process stores and sends in one step of `zero3`, of three layers."""
    sys.path.insert(0, str(FOLDER))
    import zero_scale
    from traffic import Traffic
    from transformer import Shape, Transformer, make_batch, make_optimizer

    shape = Shape(**{**SIZES, "layers": 3})
    options = {"replicas": replicas, "find_unused_parameters": False}
    accelerator = Accelerator(strategies={"zero3": options}, device="cpu")
    model = Transformer(shape)
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    with Traffic() as traffic:
        accelerator.backward(model(make_batch(shape, 0, accelerator.process_index)))
    optimizer.step()
    return zero_scale.stored(model, optimizer), traffic.sent


@pytest.mark.parametrize("replicas", [1, 2])
def test_simulated_as_real(scale: Any, replicas: int) -> None:
    found = scale.train_a_step(scale.Shape(**{**SIZES, "layers": 3}), 4, replicas)
    for stored, sent in run(4, train_really, replicas):
        assert found.stored == pytest.approx(stored)
        assert found.sent == pytest.approx(sent)


@pytest.mark.parametrize(("replicas", "shards"), [(1, 8), (2, 4)])
def test_formula_on_8_processes(scale: Any, replicas: int, shards: int) -> None:
    shape = scale.Shape(**SIZES)
    found, formula = scale.extrapolate(shape, 8, replicas), scale.formula(shape, 8, replicas)
    assert formula.shards == shards
    assert found.stored == pytest.approx(formula.stored, rel=1e-3)
    assert found.sent == pytest.approx(formula.sent, rel=1e-3)


def test_extrapolated_as_built(scale: Any) -> None:
    shape = scale.Shape(**SIZES)
    found, built = scale.extrapolate(shape, 8, 1), scale.train_a_step(shape, 8, 1)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(built))


def test_the_default_is_7_b(scale: Any) -> None:
    assert scale.count(scale.SEVEN_BILLION) == pytest.approx(7e9, rel=0.05)


def test_the_command() -> None:
    sizes = [text for name, size in SIZES.items() for text in (f"--{name}", str(size))]
    command = [sys.executable, str(FOLDER / "zero_scale.py"), "--processes", "8", *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| 8 |")]
    assert len(rows) == 2 and all(line.count("| 1.00") >= 1 for line in rows)
