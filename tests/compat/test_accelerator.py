"""`Accelerator` and `PartialState` as scripts written for Hugging Face Accelerate use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from accel import Accelerator, Config, ConfigError, DistributedType, PartialState
from accel.config import current_config
from accel.testing import run


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({"cpu": True}, {"device": "cpu"}),
        ({"mixed_precision": "bf16"}, {"mixed_precision": "bf16"}),
        ({"mixed_precision": "no"}, {"mixed_precision": "fp32"}),
        ({"mixed_precision": None, "dispatch_batches": None}, {}),
        (
            {"gradient_accumulation_steps": 3, "split_batches": True},
            {"gradient_accumulation_steps": 3, "split_batches": True},
        ),
        ({"log_with": "jsonl", "project_dir": Path("runs")}, {"trackers": ["jsonl"], "project_dir": "runs"}),
        ({"log_with": ["jsonl"]}, {"trackers": ["jsonl"]}),
        ({"log_with": "all"}, {"trackers": ["jsonl"]}),
        ({"rng_types": ["generator"], "device_placement": True, "step_scheduler_with_optimizer": True}, {}),
    ],
)
def test_arguments(arguments: dict[str, Any], settings: dict[str, Any]) -> None:
    assert Accelerator(**arguments).config == current_config().replace(**settings)


def test_arguments_come_over_a_config() -> None:
    config = Config(gradient_accumulation_steps=5, data_seed=2)
    accelerator = Accelerator(config, gradient_accumulation_steps=7)
    assert (accelerator.gradient_accumulation_steps, accelerator.config.data_seed) == (7, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_placement": False}, "device_placement: False cannot be honoured"),
        ({"step_scheduler_with_optimizer": False}, "step_scheduler_with_optimizer: False cannot"),
        ({"rng_types": ["torch"]}, r"rng_types: \['torch'\] cannot"),
        ({"log_with": object()}, "log_with: expected names of trackers"),
        ({"log_with": "nowhere"}, "trackers: no tracker named 'nowhere' is installed"),
        ({"gradient_acumulation_steps": 2}, "did you mean 'gradient_accumulation_steps'"),
        ({"config": "ddp"}, "Accelerator: expected a Config, or settings by name, got 'ddp'"),
        ({"mixed_precision": "fp7"}, "no precision named 'fp7' is installed"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Accelerator(**arguments)


def test_what_scripts_ask_in_a_world_of_one(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.state.process_index == 0
    assert accelerator.distributed_type == DistributedType.NO == "NO"
    assert accelerator.mixed_precision == "no"
    assert not accelerator.use_distributed
    accelerator.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    assert torch.equal(torch.load(tmp_path / "a.pt")["a"], torch.ones(2))
    assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"


def ask_state() -> dict[str, Any]:
    state = PartialState(cpu=True)
    with state.split_between_processes(list(range(5))) as part:
        mine = list(part)
    order: list[int] = []
    with state.main_process_first():
        order.append(state.process_index)
    return {
        "index": state.process_index,
        "count": state.num_processes,
        "main": state.is_main_process,
        "last": state.is_last_process,
        "kind": str(state.distributed_type),
        "sum": state.reduce(torch.tensor(float(state.process_index + 1))).item(),
        "accelerator": Accelerator(cpu=True, num_processes=2).process_index,
        "part": mine,
    }


def test_partial_state_on_two_processes() -> None:
    first, second = run(2, ask_state, env={"ACCEL_NUM_PROCESSES": "2"})
    assert (first["index"], second["index"]) == (0, 1)
    assert (first["main"], second["main"], first["last"], second["last"]) == (True, False, False, True)
    assert first["kind"] == second["kind"] == "MULTI_CPU"
    assert first["sum"] == second["sum"] == 3.0
    assert (first["part"], second["part"]) == ([0, 1, 2], [3, 4])
    assert (first["accelerator"], second["accelerator"]) == (0, 1)


def test_partial_state_alone() -> None:
    state = PartialState()
    assert state.distributed_type == DistributedType.NO
    assert (state.num_processes, state.is_last_process, state.use_distributed) == (1, True, False)
