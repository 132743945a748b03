"""`torch.autograd.grad` with respect to parameters: the gradient, or an error, never None in silence."""

import pytest
import torch
from torch import nn
from torch.autograd import grad

from accel import Accelerator
from accel.errors import PrepareError
from accel.testing import run


def derive(strategy):
    accelerator = Accelerator(device="cpu", strategies={strategy: {"size": 2}})
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    model = accelerator.prepare(model)
    for allow_unused in (False, True):
        loss = model(torch.ones(4, 8)).square().mean()
        with pytest.raises(PrepareError, match="the model computes with copies"):
            grad(loss, list(model.parameters()), allow_unused=allow_unused)
    free, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert grad(free.sum(), [free, other], allow_unused=True)[1] is None
    with pytest.raises(RuntimeError, match="not have been used"):
        grad(free.sum(), [free, other])
    if strategy == "zero3":
        [gradient] = grad(model[0].bias.full_tensor().square().sum(), [model[0].bias])
        torch.testing.assert_close(gradient.full_tensor(), 2 * model[0].bias.full_tensor())


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "pipeline"])
def test_gradients_that_autograd_cannot_find_are_refused(strategy):
    run(2, derive, strategy)
