"""`save_state(blocking=False)`: a consistent snapshot, one at a time, errors told, the end waits."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from accel import Accelerator
from accel.errors import CheckpointError
from accel.testing import run

from .faults import failing, replaced
from .models import prepared, train, whole


class Gate:
    """Holds up writing until it is opened."""

    def __init__(self) -> None:
        self.opened, self.reached, self.real = threading.Event(), threading.Event(), os.pwrite

    def __call__(self, handle: int, data: Any, offset: int) -> int:
        self.reached.set()
        assert self.opened.wait(30)
        return self.real(handle, data, offset)


def save_behind(folder: Path, settings: dict[str, Any]) -> None:
    """Weights are changed at once, by training and by hand, while nothing is written yet."""
    accelerator, net, optimizer = prepared(settings)
    train(accelerator, net, optimizer)
    before, gate = whole(net, optimizer, accelerator), Gate()
    with replaced("pwrite", gate):
        accelerator.save_state(folder / "c", blocking=False)
        train(accelerator, net, optimizer)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
        assert not (folder / "c").exists()
        gate.opened.set()
        accelerator.load_state(folder / "c")  # waits for it
    after = whole(net, optimizer, accelerator)
    assert all(torch.equal(after[name], before[name]) for name in before)
    accelerator.save_state(folder / "c", blocking=False)
    accelerator.save_state(folder / "c", blocking=False)
    accelerator.end_training()
    assert (folder / "c" / "manifest.json").exists()


@pytest.mark.parametrize(("size", "strategy"), [(1, "single"), (2, "ddp"), (3, "zero3")])
def test_a_snapshot_is_of_one_moment(tmp_path: Path, size: int, strategy: str) -> None:
    run(size, save_behind, tmp_path, {"strategies": [strategy]})
    assert os.listdir(tmp_path) == ["c"]


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
    accelerator, _, _ = prepared({})
    gate = Gate()
    with replaced("pwrite", gate):
        accelerator.save_state(folder / "a", blocking=False)
        gate.reached.wait(30)
        threading.Timer(0.2, gate.opened.set).start()
        accelerator.save_state(folder / "b", blocking=False)
        assert (folder / "a" / "manifest.json").exists()
    accelerator.end_training()
    assert not [thread for thread in threading.enumerate() if thread.name == "accel-checkpoint"]


def test_at_most_one_is_in_flight(tmp_path: Path) -> None:
    run(2, one_at_a_time, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


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
accelerator = Accelerator()
model = accelerator.prepare(torch.nn.Linear(1000, 1000))
accelerator.save_state(sys.argv[1], blocking=False)
"""


def test_the_end_of_the_script_waits(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "c")], check=True)
    accelerator = Accelerator()
    accelerator.prepare(torch.nn.Linear(1000, 1000))
    accelerator.load_state(tmp_path / "c")


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
    accelerator, _, _ = prepared({})
    accelerator.save_state(tmp_path / "c", blocking=False)
    buffer = weakref.ref(accelerator._checkpoints._buffers["tensors"])
    accelerator.free_memory()
    accelerator.end_training()
    assert buffer() is None
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
