"""Random numbers that processes draw alike, where they compute the same."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from ..example import Inputs, tried_out


class Numbers:
    """The generator that a model's forward draws from, of all processes of a group."""

    def __init__(self, model: nn.Module, inputs: Inputs, group: ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.drawn = self._draws(model, inputs)

    def share(self) -> None:
        """All processes go on from the generator state of the first, if the model draws numbers in training."""
        if not self.drawn:
            return
        state = self._state().to(self.device)
        dist.broadcast(state, group=self.group, group_src=0)
        if self.device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(self.device).set_rng_state(state.cpu())

    def _draws(self, model: nn.Module, inputs: Inputs) -> bool:
        args, kwargs = inputs
        with tried_out(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.train()
            before = self._state()
            model(*args, **kwargs)
            return not torch.equal(before, self._state())

    def _state(self) -> torch.Tensor:
        numbers: Any = torch if self.device.type == "cpu" else torch.get_device_module(self.device)
        state: torch.Tensor = numbers.get_rng_state()
        return state
