"""Backward in two parts gives the gradients of one, at the price of one, whatever the graph consists of."""

from __future__ import annotations

import pytest
import torch
from accel_plugins.strategies.pipeline.weights import backward_to
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from .models import WIDTH, Block


class Net(nn.Module):
    """[b, t, WIDTH] -> two of these: blocks, a weight that is used twice, one that is computed, a convolution."""

    def __init__(self, recompute=None, doubles=False):
        super().__init__()
        self.recompute, self.doubles = recompute, doubles
        self.first, self.second = Block(), Block()
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH, bias=False))
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x):
        if self.recompute is None:
            x = self.first(x, None)
        else:
            x = checkpoint(self.first, x, None, use_reentrant=self.recompute)
        if self.doubles:
            x.register_hook(lambda gradient: 2 * gradient)
        x = self.computed(self.shared(torch.tanh(self.shared(x))))
        if self.doubles:
            x.register_hook(lambda gradient: 3 * gradient)
        return self.second(x, None), self.conv(x.transpose(1, 2))


def gradients(net, split, autocast):
    """The gradients of the input and of all parameters, what waited, and what the backward pass computed."""
    x = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = net(x)
    net.zero_grad()
    ones = [torch.ones_like(output) for output in outputs]
    with FlopCounterMode(display=False) as flops:
        if split:
            weights = backward_to([x], outputs, ones)
            waiting = {name for name, p in net.named_parameters() if p.grad is None}
            if weights is not None:
                weights.backward()
        else:
            waiting = set()
            torch.autograd.backward(outputs, ones)
    return [x.grad, *(p.grad for p in net.parameters())], waiting, flops.get_total_flops()


MATRICES = {"qkv", "out", "up", "down"}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", ["plain", "hooks", "recomputed", "recomputed by reentering"])
def test_gradients_are_those_of_one_pass(case, autocast):
    torch.manual_seed(0)
    net = Net({"recomputed": False, "recomputed by reentering": True}.get(case), doubles=case == "hooks")
    whole, _, flops = gradients(net, False, autocast)
    parts, waiting, flops_of_parts = gradients(net, True, autocast)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)
    blocks = {"first", "second"} if case in ("plain", "hooks") else {"second"} if case == "recomputed" else set()
    assert {f"{block}.{name}.weight" for block in blocks for name in MATRICES} <= waiting
    assert ("conv.weight" in waiting) == bool(blocks)
    assert not any(name.startswith(("shared", "computed")) for name in waiting)
    assert flops_of_parts == flops


def test_nothing_waits_where_nobody_does():
    net = Net()
    outputs = net(torch.randn(3, 4, WIDTH))
    assert backward_to([], outputs, [torch.ones_like(output) for output in outputs]) is None
    assert all(parameter.grad is not None for parameter in net.parameters())


class CompiledFunction(torch.autograd.Function):
    """Named as torch.compile's, which gives up in backward what it would need for another."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_a_graph_with_a_compiled_part_runs_once():
    torch.manual_seed(0)
    net = Net()
    net.second.register_forward_hook(lambda module, args, output: CompiledFunction.apply(output))
    whole, _, _ = gradients(net, False, False)
    parts, waiting, _ = gradients(net, True, False)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)
    assert not waiting
