"""Calls that wait for other processes, made by some only: an error that names both lines, in place of a hang."""

import pytest
import torch
from torch import nn

from accel import Accelerator, utils
from accel.errors import CollectiveError
from accel.runtime import points
from accel.testing import run

CALLS = {
    "get_state_dict": lambda accelerator, model: accelerator.get_state_dict(model),
    "save_state": lambda accelerator, model: accelerator.save_state("checkpoint"),
    "gather": lambda accelerator, model: accelerator.gather(torch.ones(2)),
    "clip_grad_norm_": lambda accelerator, model: accelerator.clip_grad_norm_(model.parameters(), 1.0),
    "reduce": lambda accelerator, model: utils.reduce(torch.ones(2)),
    "forward": lambda accelerator, model: model(torch.ones(4, 8)),
    "full_tensor": lambda accelerator, model: model[0].weight.full_tensor(),
}


def alone(strategy, call):
    """Rank 0 makes a call between two steps that rank 1 does not make."""
    accelerator = Accelerator(device="cpu", strategies={strategy: {"size": 2}})
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(2):
        if step and accelerator.is_main_process:
            CALLS[call](accelerator, model)
        accelerator.backward(model(torch.ones(4, 8)).square().mean())
        optimizer.step(), optimizer.zero_grad()


@pytest.mark.parametrize(
    ("strategy", "call", "here", "there"),
    [
        ("ddp", "save_state", r"accelerator\.save_state", r"accelerator\.backward"),
        ("ddp", "gather", r"accelerator\.gather", r"accelerator\.backward"),
        ("ddp", "clip_grad_norm_", r"accelerator\.clip_grad_norm_", r"accelerator\.backward"),
        ("ddp", "reduce", r"accel\.utils\.reduce", r"accelerator\.backward"),
        ("tensor", "forward", "a forward", r"accelerator\.backward"),
        ("pipeline", "forward", "a forward", r"accelerator\.backward"),
        ("tensor", "get_state_dict", r"accelerator\.get_state_dict", "a forward"),
        ("context", "gather", r"accelerator\.gather", "a forward"),
        ("zero3", "full_tensor", r"full_tensor\(\)", "a forward"),
    ],
)
def test_a_call_on_the_main_process_alone_is_refused(strategy, call, here, there):
    with pytest.raises(
        CollectiveError, match=rf"rank 0 came to {here}.* at {__file__}:\d+, and rank 1 came to {there}"
    ):
        run(2, alone, strategy, call)


def whole_models():
    """What costs no exchange, one process may do alone."""
    accelerator = Accelerator(device="cpu")
    model = accelerator.prepare(nn.Linear(2, 2))
    if accelerator.is_main_process:
        assert accelerator.get_state_dict(model).keys() == {"weight", "bias"}
        model(torch.ones(2))
    accelerator.backward(model(torch.ones(1, 2)).sum())


def test_a_whole_model_is_read_by_one_process_alone():
    run(2, whole_models)


def far():
    """A store keeps as many points as processes can be apart, and no more."""
    points.KEPT = 3
    accelerator = Accelerator(device="cpu")
    for _ in range(10):
        accelerator.wait_for_everyone()
    torch.distributed.barrier()
    [store] = points.Points.of(torch.distributed.group.WORLD)._stores[:1]
    return [index for index in range(10) if store.check([str(index)])]


def test_old_points_are_forgotten():
    assert run(2, far) == [[7, 8, 9]] * 2
