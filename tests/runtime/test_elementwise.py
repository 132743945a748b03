"""Optimizers that see plain parts leave the same bits as those that see DTensors, in parameters and in state."""

import functools

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from accel import Accelerator
from accel.testing import run

MAKERS = {
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.1, amsgrad=True),
    "SGD": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "NAdam": functools.partial(torch.optim.NAdam, lr=0.1),
    "one at a time": functools.partial(torch.optim.Adam, lr=0.1, foreach=False),
}


def train(make, watched):
    """Weights and state after three steps; `watched` registers a hook, with which a step sees DTensors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    accelerator = Accelerator(strategies="zero2")
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    seen = set()
    if watched:
        optimizer.register_step_pre_hook(lambda o, *unused: seen.update(type(p) for p in o.param_groups[0]["params"]))
    for step in range(3):
        data = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + accelerator.process_index))
        accelerator.backward(model(data).square().mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert seen == ({DTensor} if watched else set())
    parameters = list(model.parameters())
    assert optimizer.param_groups[0]["params"] == parameters
    assert all(isinstance(p, DTensor) and p in optimizer.state for p in parameters)
    state = [
        {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in optimizer.state[p].items()}
        for p in parameters
    ]
    divided = [sum(isinstance(value, DTensor) for value in optimizer.state[p].values()) for p in parameters]
    return [p.full_tensor().detach() for p in parameters], state, divided


@pytest.mark.parametrize("maker", MAKERS)
def test_the_bits_are_the_same(maker):
    for plain, watched in zip(run(2, train, MAKERS[maker], False), run(2, train, MAKERS[maker], True), strict=True):
        torch.testing.assert_close(plain, watched, rtol=0, atol=0)
        assert min(plain[2]) > 0


def fail_in_a_step():
    model = nn.Linear(4, 4)
    accelerator = Accelerator(strategies="zero3")
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(torch.ones(2, 4)).sum())
    optimizer.param_groups[0]["lr"] = "none"
    with pytest.raises(Exception):  # noqa: B017, PT011 - torch's own, whatever it is
        optimizer.step()
    assert all(isinstance(p, DTensor) for p in optimizer.param_groups[0]["params"])


def test_a_step_that_fails_leaves_the_parameters_in_place():
    run(2, fail_in_a_step)
