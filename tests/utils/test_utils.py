"""`accel.utils`: helpers in a world of one and on two processes."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch

from accel import CollectiveError, ConfigError, PartialState, utils
from accel.testing import run


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def test_set_seed_repeats_every_generator() -> None:
    utils.set_seed(3)
    first = draw()
    utils.set_seed(3)
    assert draw() == first
    utils.set_seed(4)
    assert not set(draw()) & set(first)


def draw_by_rank() -> list[Any]:
    utils.set_seed(3)
    alike = draw()
    utils.set_seed(3, device_specific=True)
    return [alike, draw()]


def test_set_seed_on_two_processes() -> None:
    first, second = run(2, draw_by_rank)
    assert first[0] == second[0]
    assert first[1] != second[1]


def call_all() -> dict[str, Any]:
    state = PartialState(cpu=True)
    rank = state.process_index
    values: list[Any] = [rank, {"name": "only"}]
    utils.broadcast_object_list(values, from_process=1)
    utils.wait_for_everyone()
    return {
        "gather": utils.gather({"x": torch.tensor([rank, rank + 10])})["x"].tolist(),
        "objects": utils.gather_object([f"rank {rank}"] * (rank + 1)),
        "mean": utils.reduce(torch.tensor(float(rank))).item(),
        "sum": utils.reduce(torch.tensor(float(rank)), "sum", scale=2.0).item(),
        "broadcast": utils.broadcast(torch.tensor(rank), from_process=1).item(),
        "list": values,
        "padded": utils.pad_across_processes(torch.ones(rank + 1), pad_index=7).tolist(),
    }


def test_collectives_on_two_processes() -> None:
    first, second = run(2, call_all, env={"ACCEL_NUM_PROCESSES": "2"})
    assert first["gather"] == second["gather"] == [0, 10, 1, 11]
    assert first["objects"] == second["objects"] == ["rank 0", "rank 1", "rank 1"]
    assert (first["mean"], first["sum"], first["broadcast"]) == (0.5, 2.0, 1)
    assert first["list"] == second["list"] == [1, {"name": "only"}]
    assert (first["padded"], second["padded"]) == ([1.0, 7.0], [1.0, 1.0])


def test_collectives_alone() -> None:
    assert torch.equal(utils.gather(torch.ones(2)), torch.ones(2))
    assert utils.gather_object(["a"]) == ["a"]
    assert utils.broadcast_object_list(["a"]) == ["a"]
    utils.wait_for_everyone()


def gather_before_meeting() -> None:
    utils.gather(torch.ones(1))


def test_collectives_before_the_processes_met() -> None:
    with pytest.raises(CollectiveError, match="the 2 processes have not met yet; make an Accelerator"):
        run(2, gather_before_meeting)


def test_send_to_device_keeps_the_nesting() -> None:
    batch = {"a": [torch.ones(1), "text"], "b": (torch.zeros(2), 3)}
    moved = utils.send_to_device(batch, "meta")
    assert moved["a"][0].device.type == moved["b"][0].device.type == "meta"
    assert (moved["a"][1], moved["b"][1]) == ("text", 3)
    assert batch["a"][0].device.type == "cpu"


def shown(main_process_only: bool) -> bool:
    stream = io.StringIO()
    assert list(utils.tqdm(range(2), main_process_only=main_process_only, file=stream)) == [0, 1]
    return "100%" in stream.getvalue()


def show_both() -> tuple[bool, bool]:
    return shown(True), shown(False)


def test_progress_on_the_main_process_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(2, show_both) == [(True, True), (False, True)]
    list(utils.tqdm([1, 2], desc="here"))
    assert "here: 100%" in capsys.readouterr().err


def test_batch_size_is_halved_until_it_fits() -> None:
    tried = []

    @utils.find_executable_batch_size(starting_batch_size=100)
    def train(batch_size: int, limit: int) -> int:
        tried.append(batch_size)
        if batch_size > limit:
            raise torch.OutOfMemoryError("no more")
        return batch_size

    assert train(30) == 25
    assert train(30) == 25
    assert tried == [100, 50, 25, 25]


def test_real_memory_runs_out() -> None:
    @utils.find_executable_batch_size(starting_batch_size=2**48)
    def allocate(batch_size: int) -> int:
        return torch.empty(batch_size * 1024, dtype=torch.uint8).numel()

    assert 0 < allocate() < 2**58


def test_other_errors_pass_through() -> None:
    @utils.find_executable_batch_size
    def train(batch_size: int) -> None:
        raise RuntimeError(f"shape mismatch at {batch_size}")

    with pytest.raises(RuntimeError, match="shape mismatch at 128"):
        train()


def test_nothing_fits() -> None:
    @utils.find_executable_batch_size(starting_batch_size=4)
    def train(batch_size: int) -> None:
        raise MemoryError

    with pytest.raises(ConfigError, match=r"train\(\) runs out of memory even with a batch size of 1"):
        train()
    with pytest.raises(ConfigError, match="must take the batch size as its first argument"):
        utils.find_executable_batch_size(lambda: None)
