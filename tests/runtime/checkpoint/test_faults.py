"""Disks that fail, files that rot, processes that are killed: the old checkpoint stays, a damaged one never loads."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

from accel.errors import CheckpointError
from accel.runtime.world import World
from accel.testing import run
from accel.testing.processes import WorkerError

from .faults import FAULTS, failing, flip, replaced, short
from .models import prepared, train, whole

ZERO = {"strategies": ["zero3"]}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def survive_faults(folder: Path) -> list[str]:
    """Let each fault strike one rank while it saves over an older checkpoint, which must load as it was after it."""
    accelerator, net, optimizer = prepared(ZERO)
    train(accelerator, net, optimizer)
    accelerator.save_state(folder / "c")
    expected = whole(net, optimizer, accelerator)
    train(accelerator, net, optimizer)
    now, messages, saved = whole(net, optimizer, accelerator), [], 0
    for struck in range(accelerator.num_processes):
        for function, code, after in FAULTS:
            mine = accelerator.process_index == struck
            try:
                with failing(function, code, after if mine else 1 << 30):
                    accelerator.save_state(folder / "c")
                expected, saved = now, saved + 1
            except CheckpointError as error:
                messages += [] if os.strerror(code) in str(error) else [str(error)]
    accelerator.load_state(folder / "c")
    messages += [] if equal(whole(net, optimizer, accelerator), expected) else ["the old checkpoint has changed"]
    # rank 0 alone makes files and finishes: two of the faults never strike another rank
    messages += [] if saved == 2 * (accelerator.num_processes - 1) else [f"{saved} saved"]
    accelerator.save_state(folder / "c")
    accelerator.end_training()
    return messages


@pytest.mark.parametrize("size", [1, 3])
def test_a_failing_disk_is_an_error_everywhere_and_harms_nothing(tmp_path: Path, size: int) -> None:
    for messages in run(size, survive_faults, tmp_path):
        assert messages == []
    assert os.listdir(tmp_path) == ["c"]


def fail_to_rename(folder: Path) -> None:
    accelerator, net, optimizer = prepared(ZERO)
    accelerator.save_state(folder / "c")
    before = whole(net, optimizer, accelerator)
    train(accelerator, net, optimizer)
    for after in (0, 1):
        with pytest.raises(CheckpointError, match="c: cannot be written: Input/output error"):
            with failing("rename", errno.EIO, after if accelerator.is_main_process else 1 << 30):
                accelerator.save_state(folder / "c")
    accelerator.load_state(folder / "c")
    assert equal(whole(net, optimizer, accelerator), before)


def test_a_failing_rename(tmp_path: Path) -> None:
    run(2, fail_to_rename, tmp_path)


def save_and_load_in_small_steps(folder: Path) -> None:
    accelerator, net, optimizer = prepared(ZERO)
    train(accelerator, net, optimizer)
    before = whole(net, optimizer, accelerator)
    with short():
        accelerator.save_state(folder / "c")
        train(accelerator, net, optimizer)
        accelerator.load_state(folder / "c")
    assert equal(whole(net, optimizer, accelerator), before)


def test_short_reads_and_writes(tmp_path: Path) -> None:
    run(2, save_and_load_in_small_steps, tmp_path)


def save_numbered(project: str, count: int, settings: dict[str, object]) -> list[dict[str, torch.Tensor]]:
    accelerator, net, optimizer = prepared({**ZERO, "project_dir": project, **settings})
    saved = []
    for _ in range(count):
        train(accelerator, net, optimizer, 1)
        accelerator.save_state()
        saved.append(whole(net, optimizer, accelerator))
    accelerator.end_training()
    return saved


def load_newest(project: str) -> tuple[str, dict[str, torch.Tensor], list[str]]:
    accelerator, net, optimizer = prepared({**ZERO, "project_dir": project}, seed=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = accelerator.load_state()
    return Path(folder).name, whole(net, optimizer, accelerator), [str(w.message) for w in caught]


def test_the_newest_whole_one_is_found(tmp_path: Path) -> None:
    saved = run(2, save_numbered, str(tmp_path), 5, {})[0]
    home = tmp_path / "checkpoints"
    (home / "checkpoint_5").mkdir()
    (home / "checkpoint_4" / "manifest.json").unlink()
    flip(home / "checkpoint_3" / "model.safetensors", -1)
    (home / "checkpoint_2" / "optimizer.safetensors").unlink()
    results = run(3, load_newest, str(tmp_path))
    for rank, (name, tensors, messages) in enumerate(results):
        assert name == "checkpoint_1"
        assert equal(tensors, saved[1])
        assert len(messages) == (0 if rank else 4)
    expected = [
        "checkpoint_5: .*no manifest.json",
        "checkpoint_4: .*no manifest.json",
        r"checkpoint_3: .*model.safetensors: norm.num_batches_tracked|checkpoint_3: .*model.safetensors: .*checksum",
        "checkpoint_2: .*optimizer.safetensors: damaged: missing",
    ]
    assert all(re.search(e, m) for e, m in zip(expected, results[0][2], strict=True)), results[0][2]


def test_none_that_is_whole(tmp_path: Path) -> None:
    accelerator, _, _ = prepared({"project_dir": str(tmp_path)})
    with pytest.raises(CheckpointError, match=r"checkpoints: no complete checkpoint; save_state\(\) writes one"):
        accelerator.load_state()
    (tmp_path / "checkpoints" / "checkpoint_0").mkdir(parents=True)
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(CheckpointError, match=r"passed over .*checkpoint_0"),
    ):
        accelerator.load_state()


def test_rotation_deletes_the_oldest_after_the_new_one_is_there(tmp_path: Path) -> None:
    home = tmp_path / "checkpoints"
    (home / "checkpoint_0").mkdir(parents=True)  # unfinished: it does not count, and nobody deletes it
    (home / ".checkpoint_7.deleting" / "left").mkdir(parents=True)  # by a deletion that was killed
    run(2, save_numbered, str(tmp_path), 4, {"total_limit": 2})
    assert sorted(os.listdir(home)) == ["checkpoint_0", "checkpoint_3", "checkpoint_4"]


def fail_to_delete(project: str) -> list[str]:
    accelerator, _, _ = prepared({**ZERO, "project_dir": project, "total_limit": 1})
    accelerator.save_state()
    with failing("unlink", errno.EIO):
        accelerator.save_state()
        if accelerator.is_main_process:
            accelerator._checkpoints._deleting._thread.join()
    assert len(os.listdir(Path(project, "checkpoints"))) == 2
    with pytest.raises(CheckpointError, match=r"old checkpoint was not deleted: .*checkpoint_0\.del.*Input/output"):
        accelerator.save_state()
    accelerator.save_state()
    accelerator.end_training()
    return os.listdir(Path(project, "checkpoints"))


def test_a_failing_deletion_is_told_by_the_next_save(tmp_path: Path) -> None:
    """On all ranks, and made good by the one after it."""
    assert run(2, fail_to_delete, str(tmp_path)) == [["checkpoint_2"]] * 2


def refuse_damaged(folder: Path) -> list[str]:
    accelerator, net, optimizer = prepared(ZERO, seed=1)
    before, messages = whole(net, optimizer, accelerator), []
    for path in sorted(folder.iterdir()):
        try:
            accelerator.load_state(path)
            messages.append("loaded")
        except CheckpointError as error:
            messages.append(str(error))
    assert equal(whole(net, optimizer, accelerator), before)
    return messages


def test_every_file_is_guarded(tmp_path: Path) -> None:
    """One bit anywhere, a missing end, a missing file: each is refused by name on all ranks, and nothing changes."""
    sound = Path(save_numbered_alone(tmp_path / "project"))
    files = sorted(path.name for path in sound.iterdir())
    assert files == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "state.safetensors"]
    cases = []
    for name in files:
        size = (sound / name).stat().st_size
        for kind, offset in (("flip", 9), ("flip", size // 2), ("flip", size - 3), ("cut", size - 3), ("gone", 0)):
            copy = tmp_path / "damaged" / f"{len(cases):03}"
            shutil.copytree(sound, copy)
            cases.append(name)
            if kind == "flip":
                flip(copy / name, offset)
            elif kind == "cut":
                os.truncate(copy / name, offset)
            else:
                (copy / name).unlink()
    for messages in run(3, refuse_damaged, tmp_path / "damaged"):
        wrong = [(name, message) for name, message in zip(cases, messages, strict=True) if name not in message]
        assert wrong == []


def save_numbered_alone(project: Path) -> str:
    accelerator, net, optimizer = prepared({"project_dir": str(project)})
    train(accelerator, net, optimizer)
    return accelerator.save_state()


def test_a_damaged_tensor_is_named(tmp_path: Path) -> None:
    folder = Path(save_numbered_alone(tmp_path))
    head = json.loads((folder / "model.safetensors").read_bytes()[8:].partition(b"}}")[0] + b"}}")
    raw = (folder / "model.safetensors").read_bytes()
    data = 8 + int.from_bytes(raw[:8], "little")
    flip(folder / "model.safetensors", data + head["head.weight"]["data_offsets"][0])
    accelerator, _, _ = prepared({})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: head\.weight: damaged: wrong checksum"):
        accelerator.load_state(folder)


def die_while_saving(folder: Path, calls: int) -> None:
    accelerator, net, optimizer = prepared(ZERO)
    train(accelerator, net, optimizer)
    accelerator.save_state(folder / "c")
    train(accelerator, net, optimizer)
    real, count = os.pwrite, iter(range(1 << 30))

    def write(handle: int, data: memoryview, offset: int) -> int:
        if next(count) == calls and World.from_environment().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(handle, data, offset)

    with replaced("pwrite", write):
        with pytest.raises(CheckpointError, match="a process was lost"):
            accelerator.save_state(folder / "c")
        time.sleep(30)  # until the death of the other is noticed


@pytest.mark.parametrize("calls", [0, 5])
def test_a_killed_process_leaves_the_old_one(tmp_path: Path, calls: int) -> None:
    with pytest.raises(WorkerError, match="rank 1 was ended by signal 9"):
        run(2, die_while_saving, tmp_path, calls)
    accelerator, _, optimizer = prepared({})
    accelerator.load_state(tmp_path / "c")
    assert all(state["step"] == 2 for state in optimizer.state.values())
    accelerator.save_state(tmp_path / "c")
    accelerator.end_training()
    assert os.listdir(tmp_path) == ["c"]


def test_a_replacement_killed_between_its_renames(tmp_path: Path) -> None:
    accelerator, net, optimizer = prepared({})
    train(accelerator, net, optimizer)
    accelerator.save_state(tmp_path / "c")
    before = whole(net, optimizer, accelerator)
    (tmp_path / "c").rename(tmp_path / ".c.older")
    train(accelerator, net, optimizer)
    accelerator.load_state(tmp_path / "c")
    assert equal(whole(net, optimizer, accelerator), before)


def test_what_others_keep_in_the_folder_stays(tmp_path: Path) -> None:
    """Whether it was there before the first checkpoint or was put into one."""
    accelerator, _, _ = prepared({})
    folder = tmp_path / "c"
    (folder / "notes").mkdir(parents=True)
    (folder / "notes" / "day").write_text("one")
    (folder / "link").symlink_to("notes/day")
    accelerator.save_state(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model_2-00001-of-00002.safetensors").write_text("of an older checkpoint")
    accelerator.save_state(folder)
    accelerator.save_state(folder, blocking=False)
    accelerator.load_state(folder)
    accelerator.end_training()
    assert (folder / "notes" / "day").read_text() == (folder / "link").read_text() == "one"
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert not (folder / "model_2-00001-of-00002.safetensors").exists()
    assert os.listdir(tmp_path) == ["c"]


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    accelerator, _, _ = prepared({})
    (tmp_path / "c").write_text("mine")
    with pytest.raises(CheckpointError, match="c: cannot be written: there is a file of this name"):
        accelerator.save_state(tmp_path / "c")
    assert (tmp_path / "c").read_text() == "mine"
