"""`save_state(blocking=False)`: a consistent snapshot, one at a time, errors told, the end waits."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from accel import Accelerator
from accel.errors import CheckpointError
from accel.runtime.checkpoint import snapshot
from accel.testing import run

from .faults import failing, replaced
from .models import prepared, train, whole


class Gate:
    """Holds up a function until it is opened."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self.opened, self.reached, self.real = threading.Event(), threading.Event(), real

    def __call__(self, *arguments: Any) -> Any:
        self.reached.set()
        assert self.opened.wait(30)
        return self.real(*arguments)

    def open_soon(self) -> None:
        """While the caller waits, or is far beyond where it should have waited."""
        threading.Timer(0.2, self.opened.set).start()


@contextmanager
def copied_later() -> Iterator[Gate]:
    """Optimizer state of any size is copied behind the training, and not before the gate is opened."""
    gate = Gate(snapshot.copy_later)
    with mock.patch.multiple(snapshot, WORTH=0, copy_later=gate):
        yield gate


def save_behind(folder: Path, settings: dict[str, Any], step: str) -> None:
    """Weights are changed at once, by training and by hand, while nothing is written and no state has been copied."""
    accelerator, net, optimizer = prepared(settings)
    train(accelerator, net, optimizer)
    before, writing = whole(net, optimizer, accelerator), Gate(os.pwrite)
    with replaced("pwrite", writing), copied_later() as copying:
        accelerator.save_state(folder / "c", blocking=False)
        accelerator.backward(net(torch.randn(8, 6)).square().mean())
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
        assert not copying.opened.is_set()
        copying.open_soon()
        optimizer.step() if step == "prepared" else torch.optim.AdamW.step(optimizer)
        assert copying.opened.is_set()
        train(accelerator, net, optimizer)
        assert not (folder / "c").exists()
        writing.opened.set()
        accelerator.load_state(folder / "c")  # waits for it
    after = whole(net, optimizer, accelerator)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    accelerator.save_state(folder / "c", blocking=False)
    accelerator.save_state(folder / "c", blocking=False)
    accelerator.end_training()
    assert (folder / "c" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("size", "strategies", "step"),
    [
        (1, ["single"], "prepared"),
        (1, ["single"], "torch's own"),
        (2, ["ddp"], "prepared"),
        (2, ["zero2"], "prepared"),
        (3, ["zero3"], "prepared"),
        (2, {"zero3": {"offload": "cpu"}}, "torch's own"),
        (2, {"zero3": {"step_on": "whole"}}, "prepared"),
    ],
)
def test_a_snapshot_is_of_one_moment(tmp_path: Path, size: int, strategies: Any, step: str) -> None:
    run(size, save_behind, tmp_path, {"strategies": strategies}, step)
    assert os.listdir(tmp_path) == ["c"]


def change_behind_its_back(folder: Path) -> str:
    """The last process changes state through a tensor that it has kept; all come to know, and nothing is written."""
    accelerator, net, optimizer = prepared({"strategies": ["zero3"]})
    train(accelerator, net, optimizer)
    kept = [state["exp_avg"] for state in optimizer.state.values()]
    changes = [lambda: kept[-1].mul_(2), lambda: kept[0].to_local().zero_()]
    for change in changes:
        with copied_later() as copying:
            accelerator.save_state(folder / "c", blocking=False)
            if accelerator.is_last_process:
                change()
            copying.opened.set()
            with pytest.raises(CheckpointError, match="exp_avg was changed while it was copied") as raised:
                accelerator.end_training() if change is changes[-1] else accelerator.save_state(folder / "d")
    return str(raised.value)


def test_changes_by_other_means_are_refused(tmp_path: Path) -> None:
    first, last = run(2, change_behind_its_back, tmp_path)
    assert first == last
    assert "the checkpoint begun before was not written: optimizer: " in first
    assert "save with blocking=True" in first
    assert not list(tmp_path.iterdir())


def test_what_may_change_otherwise_is_copied_at_once(tmp_path: Path) -> None:
    """State that is a weight's memory or a gradient's, and such whose changes torch does not count."""
    accelerator, net, optimizer = prepared({})
    accelerator.backward(net(torch.randn(8, 6)).square().mean())
    state, weight = optimizer.state[net.head.weight], net.head.weight
    with torch.inference_mode():
        state["inferred"] = torch.ones(7)
    state |= {"weight": weight.data, "gradient": weight.grad[1:], "own": torch.ones(7)}
    before = {name: value.clone() for name, value in state.items()}
    with copied_later() as copying:
        accelerator.save_state(tmp_path / "c", blocking=False)
        with torch.inference_mode():
            for name in ("inferred", "weight", "gradient"):
                optimizer.__dict__["state"][weight][name].zero_()
        assert not copying.opened.is_set()
        copying.opened.set()
        accelerator.end_training()
    saved = load_file(tmp_path / "c" / "optimizer.safetensors")
    assert all(torch.equal(saved[f"head.weight.{name}"], before[name]) for name in before)


class Hasty(torch.optim.Adam):
    """Once it knows its state it changes it without asking for it, and in a way that torch does not count."""

    known: Sequence[torch.Tensor] = ()

    def step(self, closure: Any = None) -> None:
        for tensor in self.known:
            tensor.data.zero_()
        if not self.known:
            super().step(closure)
            self.known = [state["exp_avg"] for state in self.state.values()]


@pytest.mark.parametrize("ask", ["state", "state_dict", "step", "torch's own step"])
def test_who_asks_for_state_waits_for_its_copy(tmp_path: Path, ask: str) -> None:
    accelerator, net, optimizer = prepared({})
    other = nn.Linear(6, 5)
    other, second = accelerator.prepare(other, Hasty(other.parameters()))
    train(accelerator, net, optimizer)
    train(accelerator, other, second, steps=1)
    before = second.state[other.weight]["exp_avg"].clone()
    accelerator.backward(other(torch.randn(8, 6)).square().mean())
    with copied_later() as copying:
        accelerator.save_state(tmp_path / "c", blocking=False)
        copying.reached.wait(30)
        copying.open_soon()
        if ask == "state":
            second.state[other.weight]["exp_avg"].zero_()
        elif ask == "state_dict":
            second.state_dict()["state"][0]["exp_avg"].zero_()
        elif ask == "step":
            second.step()
        else:
            Hasty.step(second)
        assert copying.opened.is_set()
        assert not torch.equal(second.state[other.weight]["exp_avg"], before)
        accelerator.end_training()
    assert torch.equal(load_file(tmp_path / "c" / "optimizer_1.safetensors")["weight.exp_avg"], before)


def change_elsewhere(folder: Path) -> None:
    """Only the last process has a tensor more than at the save before: the others have copied for the old layout."""
    accelerator, net, optimizer = prepared({"strategies": ["ddp"]})
    accelerator.save_state(folder / "c", blocking=False)
    train(accelerator, net, optimizer)
    accelerator.save_state(folder / "c", blocking=False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    if accelerator.is_last_process:
        net.register_buffer("more", torch.ones(3))
    accelerator.save_state(folder / "c", blocking=False)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    accelerator.end_training()
    saved = load_file(folder / "c" / "model.safetensors")
    assert torch.equal(saved.pop("more"), torch.ones(3))
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in saved)


def test_a_change_in_another_process(tmp_path: Path) -> None:
    run(2, change_elsewhere, tmp_path)


def one_at_a_time(folder: Path) -> None:
    accelerator, _, _ = prepared({"project_dir": str(folder)})
    gate = Gate(os.pwrite)
    with replaced("pwrite", gate):
        accelerator.save_state(folder / "a", blocking=False)
        gate.reached.wait(30)
        gate.open_soon()
        accelerator.save_state(folder / "b", blocking=False)
        assert (folder / "a" / "manifest.json").exists()
    accelerator._checkpoints.wait()
    gate = Gate(os.pwrite)
    with replaced("pwrite", gate):
        accelerator.save_state(blocking=False)
        gate.open_soon()
        assert accelerator.resume()
    accelerator.end_training()
    assert not [thread for thread in threading.enumerate() if thread.name == "accel-checkpoint"]


def test_at_most_one_is_in_flight(tmp_path: Path) -> None:
    run(2, one_at_a_time, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "checkpoints"]


def fail_behind(folder: Path) -> list[str]:
    accelerator, _, _ = prepared({"strategies": ["zero3"]})
    accelerator.save_state(folder / "c")
    messages = []
    for then in (lambda: accelerator.save_state(folder / "c"), lambda: accelerator.load_state(folder / "c")):
        with failing("pwrite", errno.ENOSPC, 0 if accelerator.is_last_process else 1 << 30):
            accelerator.save_state(folder / "c", blocking=False)
            accelerator._checkpoints._writing._thread.join()
        with pytest.raises(CheckpointError) as raised:
            then()
        messages.append(str(raised.value))
        then()
    return messages


def test_errors_surface_at_the_next_call_of_every_rank(tmp_path: Path) -> None:
    for messages in run(2, fail_behind, tmp_path):
        assert len(messages) == 2
        assert all("begun before was not written" in m and "No space left on device" in m for m in messages)


SCRIPT = """
import sys, torch
from accel import Accelerator
accelerator, model = Accelerator(), torch.nn.Linear(1000, 1000)
optimizer = torch.optim.Adam(model.parameters())
accelerator.prepare(model, optimizer)
accelerator.backward(model(torch.ones(1, 1000)).sum())
optimizer.step()
accelerator.save_state(sys.argv[1], blocking=False)
"""


def test_the_end_of_the_script_waits(tmp_path: Path) -> None:
    """Also for state that is not yet copied."""
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "c")], check=True)
    accelerator, model = Accelerator(), nn.Linear(1000, 1000)
    optimizer = torch.optim.Adam(model.parameters())
    accelerator.prepare(model, optimizer)
    accelerator.load_state(tmp_path / "c")
    assert torch.equal(optimizer.state[model.bias]["exp_avg"], torch.full((1000,), 1 - 0.9))


FAILING = """
import errno, os
def fail(*arguments): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
os.pwrite = fail
"""


def test_the_end_of_the_script_tells_of_a_failure(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FAILING + SCRIPT, str(tmp_path / "c")], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "the checkpoint begun before was not written" in ended.stderr
    assert "No space left on device" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_memory_of_a_snapshot_is_given_back(tmp_path: Path) -> None:
    accelerator, net, optimizer = prepared({})
    train(accelerator, net, optimizer)
    with copied_later() as copying:
        accelerator.save_state(tmp_path / "c", blocking=False)
        buffers = [weakref.ref(buffer) for buffer in accelerator._checkpoints._buffers.values() if len(buffer)]
        accelerator.free_memory()
        copying.opened.set()
        accelerator.end_training()
    assert len(buffers) == 3
    assert not any(buffer() is not None for buffer in buffers)
    assert (tmp_path / "c" / "manifest.json").exists()


def test_the_layout_is_kept_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is true: an optimizer without state has its file, too, and state is written once there is some."""
    from accel.runtime.checkpoint import write

    real, calls = write.plan_layout, []
    monkeypatch.setattr(write, "plan_layout", lambda *arguments: calls.append(1) or real(*arguments))
    accelerator, net, optimizer = prepared({})
    counts = []

    def save_and_load() -> None:
        accelerator.save_state(tmp_path / "c", blocking=False)
        before = whole(net, optimizer, accelerator)
        accelerator.load_state(tmp_path / "c")
        assert whole(net, optimizer, accelerator).keys() == before.keys()
        counts.append(len(calls))

    save_and_load()
    train(accelerator, net, optimizer)
    save_and_load()
    train(accelerator, net, optimizer)
    save_and_load()
    accelerator.prepare(torch.optim.SGD(net.head.parameters()))
    save_and_load()
    assert counts == [1, 2, 2, 3]
