"""Names, links, and a second run in the same place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from accel import storage
from accel.errors import CheckpointError
from accel.runtime.checkpoint.checkpoints import Checkpoints
from accel.storage import lock

from ..runtime.checkpoint.models import prepared


def test_a_folder_in_the_making_belongs_to_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run is refused and deletes nothing; what a killed one has left is in nobody's way."""
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    folder = tmp_path / "c"
    with storage.made_aside(folder):
        (storage.aside(folder) / "part").touch()
        with pytest.raises(CheckpointError, match="another run is writing this checkpoint"), storage.made_aside(folder):
            pass
        assert os.listdir(storage.aside(folder)) == ["part"]
    with storage.made_aside(folder):
        assert os.listdir(storage.aside(folder)) == []


def test_a_lock_whose_folder_has_got_its_name_is_none(tmp_path: Path) -> None:
    """Between looking and locking the other run may have finished, and begun the next one."""
    (tmp_path / "made").mkdir()
    handle = os.open(tmp_path / "made", os.O_RDONLY)
    os.rename(tmp_path / "made", tmp_path / "c")
    (tmp_path / "made").mkdir()
    assert not lock._is_still(handle, tmp_path / "made")
    assert lock._is_still(handle, tmp_path / "c")
    lock.unlock(handle)


def test_nothing_is_committed_that_somebody_has_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, _, _ = prepared({})
    accelerator.save_state(tmp_path / "c")

    def finish(work, facts, numbered, write=Checkpoints._write):
        monkeypatch.setattr(storage.Manifest, "write", deleting)
        write(accelerator._checkpoints, work, facts, numbered)

    def deleting(manifest, folder, write=storage.Manifest.write):
        write(manifest, folder)
        (folder / "model.safetensors").unlink()

    monkeypatch.setattr(accelerator._checkpoints, "_write", finish)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged: missing"):
        accelerator.save_state(tmp_path / "c")
    monkeypatch.undo()
    accelerator.load_state(tmp_path / "c")


def test_a_relative_name_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for the thread that writes, and for the project's folder."""
    monkeypatch.chdir(tmp_path)
    accelerator, _, _ = prepared({"project_dir": "project"})
    (tmp_path / "elsewhere").mkdir()
    accelerator.save_state("c", blocking=False)
    monkeypatch.chdir(tmp_path / "elsewhere")
    accelerator.save_state()
    assert sorted(os.listdir(tmp_path)) == ["c", "elsewhere", "project"]
    assert os.listdir(tmp_path / "elsewhere") == []
    assert Path(accelerator.load_state()) == tmp_path / "project" / "checkpoints" / "checkpoint_0"


def test_what_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    accelerator, _, _ = prepared({})
    (tmp_path / "disk").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "disk" / "c")
    for _ in range(2):
        accelerator.save_state(tmp_path / "latest")
    accelerator.load_state(tmp_path / "latest")
    accelerator.end_training()
    assert (tmp_path / "latest").is_symlink() and os.listdir(tmp_path / "disk") == ["c"]
    storage.remove(tmp_path / "latest")
    assert os.listdir(tmp_path) == ["disk"] and os.listdir(tmp_path / "disk") == ["c"]


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_folders_that_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    accelerator, _, _ = prepared({})
    with pytest.raises(CheckpointError, match=r"name (a folder|one) inside"):
        accelerator.save_state(name)
    assert os.listdir(tmp_path) == ["here"] and os.getcwd() == str(tmp_path / "here")
