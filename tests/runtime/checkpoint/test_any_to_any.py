"""Saved anywhere, loaded anywhere: any strategy, any number of processes, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from accel.testing import run

from .models import Net, prepared, train, whole

STRATEGIES: dict[str, tuple[set[int], dict[str, Any]]] = {
    "single": ({1}, {"strategies": ["single"]}),
    "ddp": ({1, 2, 3}, {"strategies": ["ddp"]}),
    "zero1": ({2}, {"strategies": ["zero1"], "mixed_precision": "fp16"}),
    "zero2": ({3}, {"strategies": ["zero2"], "mixed_precision": "bf16"}),
    "zero3": ({2, 3, 4}, {"strategies": ["zero3"]}),
    "offload": ({2}, {"strategies": [{"zero3": {"offload": "cpu"}}]}),
    "hybrid": ({4}, {"strategies": [{"zero3": {"replicas": 2}}]}),
}


def cases(size: int) -> list[str]:
    return [name for name, (sizes, _) in STRATEGIES.items() if size in sizes]


def save_all(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Train and save under each strategy that runs on this many processes; returns what there was to save."""
    from accel.runtime.world import World

    size, saved = World.from_environment().size, {}
    for name in cases(size):
        accelerator, net, optimizer = prepared(STRATEGIES[name][1])
        train(accelerator, net, optimizer)
        saved[f"{name}_{size}"] = whole(net, optimizer, accelerator)
        accelerator.save_state(folder / f"{name}_{size}")
        accelerator.free_memory()
    return saved


def load_all(folder: Path, names: list[str]) -> dict[tuple[str, str], tuple[dict[str, Tensor], list[Any]]]:
    """Load every checkpoint under each strategy that runs on this many processes."""
    from accel.runtime.world import World

    size, loaded = World.from_environment().size, {}
    for strategy in cases(size):
        accelerator, net, optimizer = prepared(STRATEGIES[strategy][1], seed=1)
        train(accelerator, net, optimizer, 1)
        for name in names:
            accelerator.load_state(folder / name)
            settings = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
            loaded[name, f"{strategy}_{size}"] = whole(net, optimizer, accelerator), settings
        train(accelerator, net, optimizer, 1)
        accelerator.free_memory()
    return loaded


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    found: dict[str, dict[str, Tensor]] = {}
    for size in (1, 2, 3, 4):
        found |= run(size, save_all, folder)[0]
    return folder, found


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_to_any(saved: tuple[Path, dict[str, dict[str, Tensor]]], size: int) -> None:
    folder, expected = saved
    for results in run(size, load_all, folder, list(expected)):
        assert len(results) == len(expected) * len(cases(size))
        for (name, strategy), (found, settings) in results.items():
            assert found.keys() == expected[name].keys()
            wrong = [key for key in found if not torch.equal(found[key], expected[name][key])]
            assert not wrong, f"{name} loaded as {strategy}"
            assert settings == [(0.02, 0.01), (0.01, 0.1)]


def test_files_are_for_everybody(saved: tuple[Path, dict[str, dict[str, Tensor]]]) -> None:
    """The library opens them, the user's own model takes them, and the same run writes the same under any strategy."""
    folder, expected = saved
    for name, tensors in expected.items():
        model, optimizer = (load_file(folder / name / f"{group}.safetensors") for group in ("model", "optimizer"))
        Net().load_state_dict(model, strict=True)
        found = model | optimizer
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)
        values = json.loads((folder / name / "state.json").read_text())
        assert values["step"] == 2
        assert values["optimizers"][0]["groups"][1]["params"] == ["first.weight", "first.bias"]
        assert b"pickle" not in b"".join(path.read_bytes() for path in (folder / name).iterdir())


def bytes_written(folder: Path) -> list[tuple[int, int]]:
    """What this process writes and reads of tensors, counted at the system's door, under each strategy."""
    import os

    from accel.runtime.world import World

    counts = {"written": 0, "read": 0}
    pwrite, preadv = os.pwrite, os.preadv

    def counting_write(handle: int, data: Any, offset: int) -> int:
        counts["written"] += len(data)
        return pwrite(handle, data, offset)

    def counting_read(handle: int, buffers: Any, offset: int) -> int:
        got = preadv(handle, buffers, offset)
        counts["read"] += got
        return got

    os.pwrite, os.preadv = counting_write, counting_read
    found = []
    for name in cases(World.from_environment().size):
        accelerator, net, optimizer = prepared(STRATEGIES[name][1])
        train(accelerator, net, optimizer)
        counts["written"] = 0
        accelerator.save_state(folder / name)
        written, counts["read"] = counts["written"], 0
        accelerator.load_state(folder / name)
        found.append((written, counts["read"]))
        accelerator.free_memory()
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_every_byte_is_written_once_and_shared_evenly(tmp_path: Path, size: int) -> None:
    results = run(size, bytes_written, tmp_path)
    for place, name in enumerate(cases(size)):
        written = [result[place][0] for result in results]
        files = {path.name: path.stat().st_size for path in (tmp_path / name).iterdir()}
        assert sum(written) == sum(files.values())
        tensors = files["model.safetensors"] + files["optimizer.safetensors"]
        assert max(written[1:]) <= tensors / size * 1.25, name
