"""`checkpoint: safetensors`: what is saved comes back, and what cannot be says so."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accel import registry
from accel.errors import CheckpointError
from accel.interfaces import Checkpoint


@pytest.fixture
def checkpoint() -> Checkpoint:
    plugin = registry.load("checkpoint", "safetensors")
    return plugin(plugin.Options())


def test_what_is_saved_comes_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tensors = {
        "model_0": {"weight": torch.randn(3, 4), "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)},
        "optimizer_0": {"0.step": torch.tensor(7), "mask": torch.tensor([True, False])},
        "nothing": {},
    }
    values = {
        "epoch": 3,
        "lr": 0.1,
        "name": "run",
        "none": None,
        "flags": [True, False],
        "nested": {"a": [1, {"b": 2}]},
    }
    checkpoint.save(tmp_path, tensors, values)
    read_tensors, read_values = checkpoint.load(tmp_path)
    assert read_values == values
    assert read_tensors.keys() == tensors.keys()
    for group, named in tensors.items():
        assert read_tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            assert read_tensors[group][name].dtype == tensor.dtype
            torch.testing.assert_close(read_tensors[group][name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.uint8, torch.bool])
def test_dtypes(checkpoint: Checkpoint, tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(6).to(dtype)
    checkpoint.save(tmp_path, {"model": {"x": tensor}}, {})
    assert torch.equal(checkpoint.load(tmp_path)[0]["model"]["x"], tensor)
    assert checkpoint.load(tmp_path)[0]["model"]["x"].dtype == dtype


def test_views_and_tied_weights_are_each_whole(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {"base": base, "tied": base, "transposed": base.t(), "column": base[:, 1], "row": base[2]}
    checkpoint.save(tmp_path, {"model": tensors}, {})
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert read.keys() == tensors.keys()


def test_parameters_are_saved_as_plain_tensors(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 3)
    checkpoint.save(tmp_path, {"model": dict(model.named_parameters())}, {})
    read = checkpoint.load(tmp_path)[0]["model"]
    assert torch.equal(read["weight"], model.weight)
    assert type(read["weight"]) is torch.Tensor


def test_numbers_that_json_lacks(checkpoint: Checkpoint, tmp_path: Path) -> None:
    values = {
        "best": math.inf,
        "worst": -math.inf,
        "loss": [math.nan, 1e-300],
        "$float": "nan",
        "$$": {"$float": "inf"},
    }
    checkpoint.save(tmp_path, {}, values)

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    json.loads((tmp_path / "values.json").read_text(), parse_constant=refuse)
    read = checkpoint.load(tmp_path)[1]
    assert math.isnan(read["loss"].pop(0))
    assert math.isnan(values["loss"].pop(0))
    assert read == values


def test_long_integers_and_floats_are_exact(checkpoint: Checkpoint, tmp_path: Path) -> None:
    values = {"generator": 2**64 - 1, "third": 1 / 3, "text": "café \u2028 \ud7ff"}
    checkpoint.save(tmp_path, {}, values)
    assert checkpoint.load(tmp_path)[1] == values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": {"b": [1, torch.zeros(2)]}}, r"values\.a\.b\[1\]: Tensor cannot be saved as JSON"),
        ({"a": {1: 2}}, "values.a: keys must be text, got 1"),
        ({"a": {1, 2}}, "values.a: set cannot"),
    ],
)
def test_values_that_json_cannot_hold(
    checkpoint: Checkpoint, tmp_path: Path, values: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path, {}, values)


def test_what_is_no_tensor_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: weight must be a tensor, got float"):
        checkpoint.save(tmp_path, {"model": {"weight": 1.0}}, {})  # type: ignore[dict-item]


@pytest.mark.parametrize("group", ["", "a/b", "../model"])
def test_groups_are_file_names(checkpoint: Checkpoint, tmp_path: Path, group: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be a file name"):
        checkpoint.save(tmp_path, {group: {"x": torch.zeros(1)}}, {})


def test_folder_that_cannot_be_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be written"):
        checkpoint.save(tmp_path / "missing", {"model": {"x": torch.zeros(1)}}, {})
    with pytest.raises(CheckpointError, match=r"values\.json: cannot be written"):
        checkpoint.save(tmp_path / "missing", {}, {})


def test_empty_folder(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"values\.json: no such file"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"groups": 3, "values": {}}'])
def test_damaged_values(checkpoint: Checkpoint, tmp_path: Path, text: str) -> None:
    (tmp_path / "values.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"values\.json: damaged"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_damaged_tensors(checkpoint: Checkpoint, tmp_path: Path, keep: int) -> None:
    checkpoint.save(tmp_path, {"model": {"x": torch.randn(100)}}, {})
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        checkpoint.load(tmp_path)


def test_missing_group(checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"model": {"x": torch.zeros(1)}}, {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        checkpoint.load(tmp_path)
