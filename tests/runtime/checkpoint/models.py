"""A run that has one of everything a checkpoint must keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accel import Accelerator
from accel.config import Config
from accel.runtime.world import World


class Net(nn.Module):
    """[b, 6] -> [b, 5]; tied weights, buffers, sizes that no number of processes divides, a parameter without a dim."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.norm = nn.BatchNorm1d(7)
        self.second = nn.Linear(7, 7)
        self.tied = nn.Linear(7, 7)
        self.tied.weight = self.second.weight
        self.head = nn.Linear(7, 5, bias=False)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        out: Tensor = self.head(self.tied(self.second(x)))
        return out


def prepared(settings: dict[str, Any], seed: int = 0) -> tuple[Accelerator, Net, torch.optim.Optimizer]:
    """A net and an optimizer with two groups."""
    torch.manual_seed(seed)
    accelerator = Accelerator(Config(num_processes=World.from_environment().size), **settings)
    net = Net()
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": trained[2:], "lr": 0.02 + seed}, {"params": trained[:2], "weight_decay": 0.1}]
    net, optimizer = accelerator.prepare(net, torch.optim.AdamW(groups, lr=0.01))
    return accelerator, net, optimizer


def train(accelerator: Accelerator, net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        accelerator.backward(net(torch.randn(8, 6)).square().mean())
        optimizer.step(), optimizer.zero_grad()


def whole(net: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> dict[str, Tensor]:
    """All weights and optimizer state, gathered by torch: the reference for what was to be saved."""
    from torch.distributed.tensor import DTensor

    names = {id(p): name for name, p in net.named_parameters()}
    found = dict(accelerator.get_state_dict(net))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                full = value.full_tensor() if isinstance(value, DTensor) else value
                found[f"{names[id(parameter)]}.{key}"] = full.detach().cpu().clone()
    return found
