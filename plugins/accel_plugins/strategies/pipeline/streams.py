"""Random numbers on stages: those that the user's forward draws itself are alike on all, those of parts differ.

Every stage runs the user's forward and so draws what it draws, as where layers are left out at random. But each
computes other parts, whose dropout draws too. So there are two streams, and a part's begins where the last ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

States = list[Any]


class Streams:
    """The generators of this process, for the length of one forward of one stage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextlib.contextmanager
    def shared(self, seed: int) -> Iterator[None]:
        """Inside, random numbers are those of a seed; afterwards they go on where parts have ended."""
        self._parts = self.states()
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)
        try:
            yield
        finally:
            self.restore(self._parts)

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """Inside `shared`: a part computes, with random numbers of this process."""
        shared = self.states()
        self.restore(self._parts)
        try:
            yield
        finally:
            self._parts = self.states()
            self.restore(shared)

    def states(self) -> States:
        """The states of the generators."""
        states = [torch.get_rng_state()]
        if self.device.type != "cpu":
            states.append(torch.get_device_module(self.device).get_rng_state(self.device))
        return states

    def restore(self, states: States) -> None:
        """Go back to what `states` returned."""
        torch.set_rng_state(states[0])
        if self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(states[1], self.device)
