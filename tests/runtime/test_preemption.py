"""All processes stop at the same step boundary, whoever is asked and however far apart they are."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accel import Accelerator, ConfigError
from accel.interfaces.launcher import PREEMPTED
from accel.runtime.preemption import SIGNALS, Preemption
from accel.runtime.world import World
from accel.testing import run


def boundaries(slow: int, asks: int, when: int, steps: int, together: bool) -> int | None:
    """Count boundaries, as training steps do; one rank is slow and one is asked to stop. Returns where it stopped."""
    world = World.from_environment()
    world.connect("gloo", 60)
    preemption = Preemption(world, SIGNALS, None, 30)
    try:
        for step in range(1, steps + 1):
            if together:
                dist.all_reduce(torch.zeros(1))  # as gradients are: nobody gets more than a step ahead
            time.sleep(0.03 if world.rank == slow else 0.001)
            if (world.rank, step) == (asks, when):
                os.kill(os.getpid(), signal.SIGUSR1)
            if preemption.due():
                return step
        return None
    finally:
        dist.barrier()
        preemption.close()
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("slow", "asks", "together"),
    [(0, 0, True), (0, 1, True), (2, 0, True), (2, 2, True), (0, 1, False), (2, 0, False)],
)
def test_all_stop_at_the_same_boundary(slow: int, asks: int, together: bool) -> None:
    stopped = run(3, boundaries, slow, asks, 5, 100_000 if together else 10_000, together)
    assert len(set(stopped)) == 1 and stopped[0] is not None and stopped[0] > 5


@pytest.mark.parametrize("when", [4, 5])
def test_a_run_that_ends_first_just_ends(when: int) -> None:
    assert run(2, boundaries, 0, 1, when, 5, True) == [None, None]


def leave_early(rank_left: int) -> bool:
    """One rank is beyond its last boundary when the other asks."""
    world = World.from_environment()
    world.connect("gloo", 60)
    preemption = Preemption(world, SIGNALS, None, 30)
    for _ in range(3 if world.rank == rank_left else 2):
        assert not preemption.due()
    if world.rank == rank_left:
        preemption.close()
    dist.barrier()
    if world.rank == rank_left:
        return False
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.6)
    stopped = preemption.due()
    preemption.close()
    return stopped


def test_nobody_waits_for_a_process_that_has_finished() -> None:
    assert run(2, leave_early, 1) == [False, False]


def alone(time_limit: float | None) -> list[bool]:
    preemption = Preemption(World(0, 1, 0, 1), SIGNALS, time_limit, 1)
    found = [preemption.due()]
    if time_limit is None:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.1 * (time_limit or 0.05))
    found.append(preemption.due())
    preemption.close()
    return found


@pytest.mark.parametrize("time_limit", [None, 1.0])
def test_one_process_needs_no_agreement(time_limit: float | None) -> None:
    assert run(1, alone, time_limit) == [[False, True]]


def test_only_the_main_thread_hears_signals() -> None:
    errors: list[str] = []

    def make() -> None:
        try:
            Accelerator(device="cpu", save_on_signal=True)
        except ConfigError as error:
            errors.append(str(error))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert errors == ["save_on_signal: only the main thread hears signals; make the Accelerator there"]


def preempted(folder: Path, settings: dict[str, Any], ask: int | None) -> tuple[Any, list[int]]:
    """A training with windows of two that evaluates after each step; asked to stop in the middle of a window."""
    torch.manual_seed(0)
    accelerator = Accelerator(device="cpu", project_dir=str(folder), gradient_accumulation_steps=2, **settings)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = TensorDataset(torch.arange(400.0).reshape(-1, 1) / 400)
    model, optimizer, loader, test = accelerator.prepare(
        model, optimizer, DataLoader(data, 1), DataLoader(TensorDataset(data.tensors[0][:4]), 1)
    )
    accelerator.resume()
    ledger: list[int] = []
    try:
        for (x,) in loader:
            ledger += (accelerator.gather(x) * 400).round().int().flatten().tolist()
            accelerator.backward(model(x).square().mean())
            optimizer.step(), optimizer.zero_grad()
            assert len(list(test)) == len(test)
            time.sleep(0.005)
            if len(ledger) == 6 and accelerator.is_last_process and ask:
                os.kill(os.getpid(), ask)
    except SystemExit as end:
        return end.code, ledger
    finally:
        accelerator.end_training()
    return None, ledger


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_at_a_closed_window_and_resume_goes_on(tmp_path: Path, size: int, number: int) -> None:
    begun = run(size, preempted, tmp_path, {"save_on_signal": True}, number)
    assert {code for code, _ in begun} == {PREEMPTED}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_0"]
    ledger = begun[0][1]
    assert len(ledger) % (2 * size) == 0
    (code, rest), *_ = run(size, preempted, tmp_path, {"time_limit": 1000}, None)
    assert code is None
    assert ledger + rest == list(range(400))


def test_a_time_limit_saves_too(tmp_path: Path) -> None:
    begun = run(2, preempted, tmp_path, {"time_limit": 0.3}, None)
    assert [code for code, _ in begun] == [PREEMPTED] * 2
    assert (tmp_path / "checkpoints" / "checkpoint_0").is_dir()
