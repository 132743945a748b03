"""Memory that saves and loads take besides the state: at most one shard and the largest tensor, in every process."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel import Accelerator
from accel.testing import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's own record of a process's peak")

WIDTH, LAYERS = 1024, 8
TENSOR = 4 * WIDTH**2
STATE = 3 * LAYERS * TENSOR
"""Bytes of weights and Adam's two moments."""


def extra(act: Callable[[], Any]) -> int:
    """The most bytes that this process had at any moment of it, mapped files included, above what it had before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on
    before = _kernel("VmRSS")
    act()
    return _kernel("VmHWM") - before


def _kernel(fact: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{fact}:")]
    return int(line.split()[1]) * 1024


def save_and_load(folder: Path, strategy: str, other: Path | None) -> dict[str, int]:
    accelerator = Accelerator(strategies=[strategy])
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
    optimizer = torch.optim.Adam(model.parameters())
    accelerator.prepare(model, optimizer)
    for _ in range(2):
        accelerator.backward(model(torch.ones(1, WIDTH)).square().mean())
        optimizer.step(), optimizer.zero_grad()
    found = {
        "save": extra(lambda: accelerator.save_state(folder)),
        "load": extra(lambda: accelerator.load_state(folder)),
    }
    if other:
        found["load of another layout"] = extra(lambda: accelerator.load_state(other))
    found["snapshot"] = extra(lambda: accelerator.save_state(folder, blocking=False))
    accelerator.end_training()
    accelerator.free_memory()
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_extra_memory(tmp_path: Path, size: int) -> None:
    other = None
    for strategy in ("ddp", "zero2", "zero3"):
        folder = tmp_path / strategy
        for found in run(size, save_and_load, folder, strategy, other):
            assert max(found.values()) <= STATE // size + TENSOR, (strategy, found)
        other = folder
