"""Weights alone, to and from the folders that the Hugging Face ecosystem uses, and what does not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from accel import Accelerator
from accel.errors import CheckpointError, ConfigError
from accel.testing import run

from .models import Net, prepared, train, whole

STRATEGIES = {1: "single", 2: "ddp", 3: "zero3"}


def export(folder: Path, shard: Any) -> dict[str, torch.Tensor]:
    accelerator, net, _ = prepared({"strategies": [STRATEGIES[Accelerator().num_processes]]})
    accelerator.save_model(net, folder, max_shard_size=shard)
    return accelerator.get_state_dict(net)


def read_back(folder: Path) -> dict[str, torch.Tensor]:
    accelerator, net, _ = prepared({"strategies": [STRATEGIES[Accelerator().num_processes]]}, seed=1)
    assert not accelerator.load_model(net, folder)
    return accelerator.get_state_dict(net)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_export_and_import(tmp_path: Path, size: int) -> None:
    """First one file, then several in its place: never are files of both there, and others are let be."""
    (tmp_path / "config.json").write_text("{}")
    expected = run(size, export, tmp_path, "5GB")[0]
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    Net().load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    run(size, export, tmp_path, 400)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {"config.json", "model.safetensors.index.json", *index.values()} == set(os.listdir(tmp_path))
    assert len(set(index.values())) > 1
    for name, tensor in expected.items():
        assert torch.equal(load_file(tmp_path / index[name])[name], tensor)
    for found in run(4 - size, read_back, tmp_path):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_tied_weights_that_are_saved_once(tmp_path: Path) -> None:
    """As Hugging Face saves them: under one of their names."""
    state = {name: torch.ones_like(value) for name, value in Net().state_dict().items() if name != "tied.weight"}
    save_file(state, tmp_path / "model.safetensors")
    accelerator, net, _ = prepared({})
    assert not accelerator.load_model(net, tmp_path)
    assert net.tied.weight.eq(1).all()
    assert net.tied.weight is net.second.weight


def test_other_dtypes_are_converted(tmp_path: Path) -> None:
    accelerator = Accelerator()
    model = accelerator.prepare(nn.Linear(2, 2))
    save_file(
        {"weight": torch.full((2, 2), 1.5).half(), "bias": torch.ones(2).double()}, tmp_path / "model.safetensors"
    )
    accelerator.load_model(model, tmp_path)
    assert model.weight.tolist() == [[1.5, 1.5], [1.5, 1.5]]
    assert (model.weight.dtype, model.bias.tolist()) == (torch.float32, [1, 1])


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"weight": (2, 2)}, "missing: bias; prepare what was saved, or pass strict=False"),
        ({"weight": (2, 3), "bias": (2,)}, r"other shapes: weight is \(2, 3\), here \(2, 2\)"),
        ({"weight": (2, 2), "bias": (2,), "x": (1,)}, "unexpected: x"),
        ({"module.weight": (2, 2), "module.bias": (2,)}, r"keys there begin with 'module\.'"),
        ({"weights": (2, 2), "bias": (2,)}, "was 'weights' renamed to 'weight'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, saved: dict[str, tuple[int, ...]], message: str) -> None:
    save_file({name: torch.ones(shape) for name, shape in saved.items()}, tmp_path / "model.safetensors")
    accelerator = Accelerator()
    model = accelerator.prepare(nn.Linear(2, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        accelerator.load_model(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.warns(UserWarning, match="load_model: left out of"):
        differences = accelerator.load_model(model, tmp_path, strict=False)
    assert differences
    for name, value in model.state_dict().items():
        fits = saved.get(name) == tuple(value.shape)
        assert torch.equal(value, torch.ones_like(value) if fits else before[name])


FSDP = "pytorch_model_fsdp"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin", "optimizer.bin"], "a pickled model; torch.load it"),
        ([".metadata", "__0_0.distcp"], "torch's distributed checkpoint"),
        (["latest", "random_states_0.pkl"], "DeepSpeed"),
        ([f"{FSDP}_0/.metadata", "optimizer_0/.metadata", "scheduler.bin"], "sharded by .* accelerate merge-weights"),
        ([f"{FSDP}.bin", "optimizer.bin"], "Hugging Face Accelerate pickled; torch.load it"),
        ([f"{FSDP}_1.bin", "optimizer.bin"], "Hugging Face Accelerate pickled; torch.load it"),
        ([f"{FSDP}_rank0.bin", f"{FSDP}_rank1.bin"], "a part from each process; .*SHARDED_STATE_DICT"),
        ([f"{FSDP}_0_rank0.bin", "optimizer_0_rank0.bin"], "a part from each process; .*SHARDED_STATE_DICT"),
        (["optimizer.bin", "scheduler.bin"], "Accelerate; load_model.. reads its weights if"),
        (["mp_rank_00_model_states.pt"], "a part of what DeepSpeed saved"),
        (["trainer_state.json", "optimizer.pt"], "Trainer; load_model.. reads its weights"),
        (["unet.safetensors"], r"it holds unet\.safetensors; weights are read from model|no manifest\.json$"),
        (["notes.txt"], r"model\.safetensors: no such file$|no manifest\.json$"),
    ],
)
def test_folders_of_others(tmp_path: Path, files: list[str], message: str) -> None:
    """Each is told with what to do about it, by both ways to load."""
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    accelerator = Accelerator()
    with pytest.raises(CheckpointError, match=message):
        accelerator.load_model(accelerator.prepare(nn.Linear(1, 1)), tmp_path)
    with pytest.raises(CheckpointError, match=f"not a complete checkpoint: .*({message})"):
        accelerator.load_state(tmp_path)


def test_files_in_place_of_folders(tmp_path: Path) -> None:
    accelerator = Accelerator()
    model = accelerator.prepare(nn.Linear(1, 1))
    for name, hint in ((f"{FSDP}.bin", "torch.load it"), ("model.safetensors", "name the folder of a model.safetens")):
        (tmp_path / name).touch()
        with pytest.raises(CheckpointError, match=hint):
            accelerator.load_model(model, tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name}: this is a file, and a checkpoint is a folder"):
            accelerator.load_state(tmp_path / name)


def test_weights_beside_anothers_state(tmp_path: Path) -> None:
    """As Accelerate saves a model that is not divided: the weights load, and of the rest it is said what it is."""
    save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "optimizer.bin").touch()
    accelerator = Accelerator()
    model = accelerator.prepare(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="Hugging Face Accelerate; load_model"):
        accelerator.load_state(tmp_path)
    assert not accelerator.load_model(model, tmp_path)
    assert model.weight.eq(1).all()


def test_a_folder_of_weights_is_no_checkpoint(tmp_path: Path) -> None:
    accelerator, net, _ = prepared({})
    accelerator.save_model(net, tmp_path)
    with pytest.raises(CheckpointError, match="it holds weights alone, which load_model"):
        accelerator.load_state(tmp_path)


@pytest.mark.parametrize("size", ["", "5XB", "0", "-1", 0])
def test_sizes_that_are_none(tmp_path: Path, size: Any) -> None:
    accelerator = Accelerator()
    with pytest.raises(CheckpointError, match="max_shard_size: expected bytes"):
        accelerator.save_model(nn.Linear(1, 1), tmp_path, max_shard_size=size)
    with pytest.raises(ConfigError, match="safe_serialization"):
        accelerator.save_model(nn.Linear(1, 1), tmp_path, safe_serialization=False)


def test_optimizers_that_do_not_fit(tmp_path: Path) -> None:
    accelerator, net, optimizer = prepared({})
    train(accelerator, net, optimizer)
    accelerator.save_state(tmp_path / "c")
    other, _, _ = fresh(lambda model: torch.optim.AdamW([*model.head.parameters(), model.norm.running_mean], lr=1.0))
    with pytest.raises(
        CheckpointError, match=r"AdamW: parameters missing: group_0\.parameter_1; unexpected: first\.bias"
    ):
        other.load_state(tmp_path / "c")
    other, _, _ = fresh(lambda model: torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(CheckpointError, match="holds the state of AdamW, here is SGD"):
        other.load_state(tmp_path / "c")
    other, model, some = fresh(lambda model: torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.warns(UserWarning, match="optimizer: other kinds: AdamW, here SGD"):
        other.load_state(tmp_path / "c", strict=False)
    assert some.param_groups[0]["lr"] == 1.0
    train(other, model, some)
    other, model, some = fresh(lambda model: torch.optim.AdamW(model.head.parameters(), lr=1.0))
    with pytest.warns(UserWarning, match="optimizer: unexpected: first.bias"):
        other.load_state(tmp_path / "c", strict=False)
    assert some.param_groups[0]["lr"] == 0.02
    saved = whole(net, optimizer, accelerator)
    assert torch.equal(some.state[model.head.weight]["exp_avg"], saved["head.weight.exp_avg"])


def test_a_scheduler_of_another_class(tmp_path: Path) -> None:
    """Torch would take over all attributes, and go on with numbers that mean nothing."""
    accelerator, _, optimizer = prepared({})
    accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer, 3))
    accelerator.save_state(tmp_path / "c")
    other, _, optimizer = prepared({})
    scheduler = other.prepare(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    with pytest.raises(CheckpointError, match="the state of StepLR, here ExponentialLR; prepare the same schedulers"):
        other.load_state(tmp_path / "c")
    with pytest.warns(UserWarning, match="scheduler: other kinds: StepLR, here ExponentialLR"):
        other.load_state(tmp_path / "c", strict=False)
    assert "step_size" not in scheduler.state_dict()


def test_a_sparse_buffer_is_named(tmp_path: Path) -> None:
    accelerator, model = Accelerator(), nn.Linear(1, 1)
    model.register_buffer("graph", torch.eye(2).to_sparse())
    accelerator.prepare(model)
    with pytest.raises(CheckpointError, match=r"graph: a tensor of layout torch.sparse_coo .* to_dense"):
        accelerator.save_state(tmp_path / "c")


def test_state_of_parameters_with_other_shapes_is_left_out(tmp_path: Path) -> None:
    """It would be taken for theirs at the next step: an average of shape [2] for a bias of shape [1]."""
    made = []
    for width in (2, 1):
        torch.manual_seed(0)
        accelerator, model = Accelerator(), nn.Sequential(nn.Linear(3, 2), nn.Linear(2, width))
        made.append(accelerator.prepare(model, torch.optim.Adam(model.parameters())))
        if width == 2:
            step(accelerator, *made[0])
            accelerator.save_state(tmp_path / "c")
    with pytest.warns(UserWarning, match="other shapes") as told:
        accelerator.load_state(tmp_path / "c", strict=False)
    assert [str(warning.message).partition("/c: ")[2] for warning in told] == [
        "model: other shapes: 1.weight is (2, 2), here (1, 2), 1.bias is (2,), here (1,)",
        "optimizer: other shapes: 1.weight, 1.bias",
    ]
    (old, kept), (new, optimizer) = made
    assert list(optimizer.state) == [new[0].weight, new[0].bias]
    assert torch.equal(optimizer.state[new[0].weight]["exp_avg"], kept.state[old[0].weight]["exp_avg"])
    step(accelerator, new, optimizer)


def fresh(make: Callable[[Net], torch.optim.Optimizer]) -> tuple[Accelerator, Net, torch.optim.Optimizer]:
    accelerator, model = Accelerator(), Net()
    return accelerator, *accelerator.prepare(model, make(model))


def test_groups_are_matched_by_name(tmp_path: Path) -> None:
    """The same groups in another order, and parameters in another order, get their own settings and state."""
    accelerator, net, optimizer = prepared({})
    train(accelerator, net, optimizer)
    accelerator.save_state(tmp_path / "c")
    saved = whole(net, optimizer, accelerator)

    def other_way_round(model: Net) -> torch.optim.Optimizer:
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW([{"params": trained[1::-1]}, {"params": trained[:1:-1]}])

    other, model, swapped = fresh(other_way_round)
    other.load_state(tmp_path / "c")
    assert [(g["lr"], g["weight_decay"]) for g in swapped.param_groups] == [(0.01, 0.1), (0.02, 0.01)]
    found = whole(model, swapped, other)
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    other, _, _ = fresh(lambda model: torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))
    with pytest.raises(CheckpointError, match="one group here, and were saved in groups with different settings"):
        other.load_state(tmp_path / "c")


OPTIMIZERS = ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adadelta", "Adamax", "ASGD", "Rprop"]


def test_every_optimizer_of_torch(tmp_path: Path) -> None:
    for name in [*OPTIMIZERS, "Adafactor", "LBFGS"]:
        states = []
        for resume in (False, True):
            torch.manual_seed(resume)
            accelerator, model = Accelerator(), nn.Linear(3, 4)
            options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
            optimizer = getattr(torch.optim, name)(model.parameters(), **options)
            accelerator.prepare(model, optimizer)
            if resume:
                accelerator.load_state(tmp_path / name)
            else:
                step(accelerator, model, optimizer)
                accelerator.save_state(tmp_path / name)
            step(accelerator, model, optimizer)
            states.append([*model.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*states, strict=True)), name


def step(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x = torch.linspace(-1, 1, 15).view(5, 3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        accelerator.backward(loss)
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


class Counting(nn.Linear):
    """Keeps something that is no tensor."""

    count = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_extra_state_of_modules(tmp_path: Path) -> None:
    accelerator = Accelerator()
    model = accelerator.prepare(nn.Sequential(Counting(1, 1)))
    model[0].count = 7
    accelerator.save_state(tmp_path / "c")
    model[0].count = 0
    accelerator.load_state(tmp_path / "c")
    assert model[0].count == 7
