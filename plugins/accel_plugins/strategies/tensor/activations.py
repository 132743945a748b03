"""Activations that stay divided between layers: sequences, and the logits of a vocabulary."""

from __future__ import annotations

from typing import Any

from torch import nn

from accel.errors import PrepareError
from accel.runtime.divided.borders import Whereabouts
from accel.runtime.divided.peers import Peers

from .plan import Decisions

SEQUENCE, LOSS = "strategies.tensor.sequence_parallel", "strategies.tensor.loss_parallel"


class Activations:
    """What a divided model's activations are to be divided along, by the options; and what was seen of them."""

    def __init__(self, model: nn.Module, peers: Peers, options: Any) -> None:
        self.model, self.peers = model, peers
        self.sequence, self.loss = options.sequence_parallel, options.loss_parallel
        self.where = Whereabouts(model)
        self.settings = " and ".join(name for name, wanted in ((SEQUENCE, self.sequence), (LOSS, self.loss)) if wanted)

    def begin(self, decisions: Decisions) -> None:
        """Divide them from now on. Raises PrepareError if there are no logits that could be."""
        if self.loss and not any(decision.style == "gathered" for decision in decisions.values()):
            raise PrepareError(
                f"{LOSS}: no head of this {type(self.model).__name__} is divided by a vocabulary, so there are no "
                "logits to leave divided; leave the option out"
            )
        self.peers.sequence, self.peers.logits = self.sequence, self.loss

    def check(self, fault: str, divided: bool) -> None:
        """Raise PrepareError if they change an example, or if no process of the run has `divided` a sequence there."""
        name = type(self.model).__name__
        if fault:
            raise PrepareError(f"{self.settings}: on an example it changes {fault}{self._suspects()}; leave it out")
        if self.sequence and not divided:
            raise PrepareError(
                f"{SEQUENCE}: no sequence of this {name} was divided on the example: it has no row layer or divided "
                f"embedding that gives [.., at least {self.peers.size} positions, width]; say a longer input in "
                "strategies.tensor.example, or leave the option out"
            )

    def describe(self, found: dict[str, str]) -> None:
        """Add to what is said of each layer."""
        for name in self.where.divided:
            if name in found:
                found[name] += f", on 1/{self.peers.size} of the positions"
        for name, reasons in self.where.found.items():
            why = f"puts the whole sequence together: {'; '.join(sorted(reasons))}"
            found[name or "forward"] = f"{found[name]}; {why}" if name in found else why

    def _suspects(self) -> str:
        modules = [f"{name or 'forward'}: {', '.join(sorted(why))}" for name, why in self.where.found.items()]
        return f" (not divided: {'; '.join(modules[:5])})" if modules else ""
