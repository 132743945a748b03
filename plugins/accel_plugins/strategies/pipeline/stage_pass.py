"""One micro-batch in one stage: its forward, and its backward when gradients have come."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .message import Message
from .nest import put_together
from .questions import Answer, Recorder
from .run import Run
from .weights import Weights, backward_to

if TYPE_CHECKING:
    from .engine import StagedModel


class Arrival:
    """A tensor from elsewhere, and the gradient that goes back there once backward has come to it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.gradient: Tensor | None = None
        self.anchor = torch.zeros((), requires_grad=True)

    def tensor(self) -> Tensor:
        """The value as this process computes with it; it may be changed in place."""
        arrived: Tensor = _Arrive.apply(self.anchor, self)  # type: ignore[no-untyped-call]
        return arrived


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, arrival: Arrival) -> Tensor:
        ctx.arrival = arrival
        return arrival.value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        ctx.arrival.gradient = gradients[0]
        return None, None


class Pass:
    """One micro-batch in one stage. `values` are the tensors among the user's arguments, `message` what came before.

    `learning` are the places of arguments that want a gradient. After `run`, `sends` is what the next stage gets, and
    `answers` what the forward was told of its data, if that was listened to.
    """

    def __init__(
        self,
        model: StagedModel,
        stage: int,
        skeleton: Any,
        values: list[Tensor],
        learning: Sequence[int],
        message: Message,
    ) -> None:
        self.model, self.stage, self.skeleton, self.values, self.message = model, stage, skeleton, values, message
        self.learning = learning
        self.inputs: dict[int, Arrival] = {}
        self.sends: Message | None = None
        self.weights: Weights | None = None
        self.answers: list[Answer] = []
        self._arrivals: list[Arrival] = []
        self._states = model.streams.states()
        self._buffers = model.own_buffers.copies()

    def run(self, keeps: bool, listens: bool = False) -> Any:
        """Forward; returns the user's output if this is the end. `keeps` says whether to keep the graph."""
        with torch.set_grad_enabled(keeps):
            arrived, values = self._arrive() if keeps else (self.message.payload, self.values)
            run = Run(self.model.split, self.model.parts, self.stage, self.model.device, self.message, arrived)
            args, kwargs = put_together(self.skeleton, list(values))
            recorder = run.recorder = Recorder(run) if listens else None
            ends = self.stage == self.model.split.stages
            buffers = nullcontext() if ends else self.model.own_buffers.as_of(self._buffers)
            with buffers, recorder or nullcontext():
                output = run.forward(self.model.own_forward, args, kwargs)
        if recorder is not None:
            self.answers = recorder.answers if ends else recorder.deciding()
        if not ends:
            calls, payload = run.results()
            self.sends = Message(self.message.seed, calls, payload, [t.requires_grad for t in payload])
        return output

    def run_again(self) -> None:
        """Forward again, to have the graph, with the random numbers of the first time."""
        now, told = self.model.streams.states(), self.sends
        assert told is not None
        self.model.streams.restore(self._states)
        try:
            with self.model.precision.forward():
                self.run(keeps=True)
        finally:
            self.model.streams.restore(now)
        assert self.sends is not None
        self.sends.learns = told.learns  # as the next stage was told

    def backward(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Backward from gradients of some of the tensors that this made; returns those of what arrived and learns.

        Where the schedule lets gradients of weights wait, `weights` is what is left to do.
        """
        known = [(t, g) for t, g in zip(tensors, gradients, strict=True) if g is not None and t.requires_grad]
        if known:
            waiting = [*self._arrivals, *self.inputs.values()] if self.model.weights_wait else []
            ends = [arrival.anchor for arrival in waiting]
            self.weights = backward_to(ends, [t for t, _ in known], [g for _, g in known])
        return [arrival.gradient for arrival in self._arrivals]

    def _arrive(self) -> tuple[list[Tensor], list[Tensor]]:
        message = self.message
        arrivals = [Arrival(t) if learns else None for t, learns in zip(message.payload, message.learns, strict=True)]
        self._arrivals = [arrival for arrival in arrivals if arrival]
        self.inputs = {place: Arrival(self.values[place]) for place in self.learning}
        payload = [a.tensor() if a else t for a, t in zip(arrivals, message.payload, strict=True)]
        values = [self.inputs[p].tensor() if p in self.inputs else v for p, v in enumerate(self.values)]
        return payload, values
