"""`accel checkpoints` and `accel merge`: what they say of checkpoints that a run has written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from accel import Accelerator
from accel.cli import main


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Three numbered checkpoints, the last unfinished, and one with a name."""
    torch.manual_seed(0)
    accelerator = Accelerator(project_dir=str(tmp_path))
    model = nn.Linear(3, 2)
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        folder = accelerator.save_state()
    Path(folder, "manifest.json").unlink()
    accelerator.save_state(tmp_path / "checkpoints" / "best")
    return tmp_path / "checkpoints"


def test_ls(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", "ls", str(home)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "checkpoint_0", "checkpoint_1", "checkpoint_2", "best"]
    assert [line.endswith("complete") for line in lines[1:]] == [True, True, False, True]
    assert "there is no manifest.json" in lines[3]
    assert "kB" in lines[1]


def test_ls_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", "ls", str(tmp_path)]) == 0
    assert "no checkpoints" in capsys.readouterr().out
    assert main(["checkpoints", "ls", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_verify(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray((home / "checkpoint_1" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (home / "checkpoint_1" / "model.safetensors").write_bytes(data)
    assert main(["checkpoints", "verify", str(home / "checkpoint_0"), str(home / "best")]) == 0
    assert capsys.readouterr().out.count("whole") == 2
    assert main(["checkpoints", "verify", str(home)]) == 1
    out = capsys.readouterr().out
    assert "checkpoint_1: model.safetensors: bias: damaged: wrong checksum" in out
    assert "checkpoint_2: not a complete checkpoint" in out
    assert out.count("whole") == 2


def test_rm(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", "rm", str(home / "checkpoint_2"), str(home / "best")]) == 0
    assert sorted(os.listdir(home)) == ["checkpoint_0", "checkpoint_1"]
    assert main(["checkpoints", "rm", str(home)]) == 2
    assert "not a checkpoint" in capsys.readouterr().err
    assert (home / "checkpoint_0").is_dir()


def test_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accelerator = Accelerator()
    model = accelerator.prepare(nn.Sequential(*[nn.Linear(5, 5) for _ in range(4)]))
    accelerator.save_model(model, tmp_path / "parts", max_shard_size=200)
    assert len(list((tmp_path / "parts").iterdir())) > 2
    assert main(["merge", str(tmp_path / "parts"), str(tmp_path / "whole" / "model.safetensors")]) == 0
    merged = load_file(tmp_path / "whole" / "model.safetensors")
    assert all(torch.equal(merged[name], value) for name, value in model.state_dict().items())
    assert os.listdir(tmp_path / "whole") == ["model.safetensors"]
    assert main(["merge", str(tmp_path / "parts"), str(tmp_path / "whole")]) == 2
    assert "exists; name a new file" in capsys.readouterr().err
    assert main(["merge", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_merged(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray((home / "best" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (home / "best" / "model.safetensors").write_bytes(data)
    assert main(["merge", str(home / "best"), str(tmp_path / "out.safetensors")]) == 2
    assert "model.safetensors: bias: damaged" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
