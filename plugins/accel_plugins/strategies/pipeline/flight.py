"""One forward call on its way through the stages, and its gradients on their way back."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from accel.errors import PrepareError
from accel.runtime.divided.tensor import whole_of
from accel.runtime.example import is_tried_out
from accel.runtime.nested import map_tensors, tensors

from .absent import Absent
from .batches import Batch, merge, separate
from .message import Failure, Message
from .nest import take_apart
from .outputs import await_output
from .schedule import Step, computed_again, drain, fill, in_flight, weights_waiting
from .stage_pass import Pass
from .weights import Weights

if TYPE_CHECKING:
    from .engine import StagedModel


class Flight:
    """What this process has of one forward call of the whole model; `learns` says whether backward may follow."""

    def __init__(self, model: StagedModel, batch: Batch, learns: bool) -> None:
        self.model, self.batch, self.learns = model, batch, learns
        self._passes: dict[Step, Pass] = {}
        self._graphs: set[Step] = set()
        self._ends: dict[int, Message] = {}
        self._tail: Pass | None = None
        self._outputs: list[Tensor] = []
        self._failure: Failure | None = None
        self._error: Exception | None = None
        self._drained = False
        self._waiting: deque[tuple[Step, Weights]] = deque()
        self._hearing = model.questions.hear((batch.kind(None), model.model.training, learns))
        self._steps = fill(model.rank, model.ranks, model.split.stages, batch.passes)
        self._again = computed_again(self._steps, model.rank, model.ranks) if model.recomputes else frozenset[Step]()

    def forward(self) -> tuple[Any, list[Tensor], list[bool]]:
        """Take all micro-batches through the stages; returns the output apart from its tensors, and these.

        The last value says which tensors learn. Raises the error of this stage, or PrepareError that names another's.
        """
        model, steps = self.model, self._steps
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            message = self._receive(step)
            if following is not None and following.stage:
                model.wire.expect(model.previous, self._way(following.stage, following))
            self._send_on(step, self._forward_step(step, message))
        said, sent = self._end() if model.is_last else (None, [])
        found = model.wire.broadcast(model.ranks - 1, self.batch.kind(None), said, sent, self._failure)
        model.wire.finish()
        if self._error is not None:
            raise self._error
        if isinstance(found, Failure):
            raise PrepareError(f"pipeline: {found.text}")
        self._hearing.end()
        (skeleton, learns, stays), sent = found
        return skeleton, self._with_those_that_stay(stays, sent), learns

    def backward(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Take the gradients of the outputs that learn back; returns those of the arguments that want one."""
        if self._drained:
            raise PrepareError(
                f"backward: a second time through one forward call of this {self.model.name}, whose pipeline has been "
                "drained; add the losses up and call backward once, or call the model again"
            )
        self._drained = True
        model = self.model
        steps = drain(model.rank, model.ranks, model.split.stages, self.batch.passes)
        ahead = deque(step for step in steps if step not in self._graphs)
        with model.tied.collecting():
            ends = self._backward_end(gradients) if model.is_last else []
            for step, following in zip(steps, [*steps[1:], None], strict=True):
                while ahead and len(self._graphs) < in_flight(model.rank, model.ranks):
                    self._recompute(ahead.popleft())
                self._backward_step(step, ends, following)
                self._backward_weights(weights_waiting(model.rank))
            self._backward_weights(0)
            model.wire.finish()
        return self.batch.gradients(model.wire.group)

    def _forward_step(self, step: Step, message: Message | Failure) -> Message | Failure:
        """The message of a micro-batch after this stage; a failure where this stage or one before it failed."""
        if isinstance(message, Failure):
            self._failure = self._failure or message
        if self._failure is not None or isinstance(message, Failure):
            return self._failure or message
        batch = self.batch
        done = Pass(self.model, step.stage, batch.skeleton, batch.values(step.micro_batch), batch.learning(), message)
        try:
            listens = self._hearing.listens and step.micro_batch < batch.count
            keeps = self.learns and step not in self._again
            if keeps and self._again and not self._graphs:
                torch.clear_autocast_cache()  # of casts that were made without a graph
            done.run(keeps, listens)
            if listens:
                self._hearing.compare(step.stage, done.answers)
        except Exception as error:  # noqa: BLE001 - raised once the other stages know of it
            self._fail(error, f"stage {step.stage}")
            return self._failure  # type: ignore[return-value]
        sends = done.sends
        assert sends is not None
        if self.learns:
            self._remember(step, done, sends)
        return sends

    def _remember(self, step: Step, done: Pass, sends: Message) -> None:
        self._passes[step] = done
        if step not in self._again:
            self._note_graph(step)
        if self._again:  # what learns is not known without a graph, and told alike of all micro-batches
            sends.learns = [tensor.is_floating_point() for tensor in sends.payload]

    def _receive(self, step: Step) -> Message | Failure:
        if step.stage == 0:
            return Message(int(torch.randint(2**62, ()).item()), [], [], [])
        found = self.model.wire.receive(self.model.previous, self._way(step.stage, step))
        if isinstance(found, Failure):
            return found
        (calls, learns), payload, seed = found
        return Message(seed, calls, payload, learns)

    def _send_on(self, step: Step, message: Message | Failure) -> None:
        model = self.model
        if step.stage == model.split.stages - 1:
            if isinstance(message, Message):
                self._ends[step.micro_batch] = message
            return
        way = self._way(step.stage + 1, step)
        if isinstance(message, Failure):
            model.wire.fail(model.next, way, message)
        else:
            model.wire.send(model.next, way, (message.calls, message.learns), message.payload, message.seed)

    def _way(self, stage: int, step: Step) -> Any:
        """The kind of the messages between a stage and the one before it, about micro-batches of this shape."""
        return stage, self.batch.kind(step.micro_batch)

    def _end(self) -> tuple[Any, list[Tensor]]:
        """What follows the last stage, on the whole batch; returns what is to be said of the output, its tensors."""
        if self._failure is not None:
            return None, []
        try:
            messages = [self._ends[index] for index in range(self.batch.count)]
            self._merged, self._origins = merge(messages, self.batch.sizes, self.model.split)
            stages, batch = self.model.split.stages, self.batch
            self._tail = Pass(self.model, stages, batch.skeleton, batch.values(None), batch.learning(), self._merged)
            output = map_tensors(whole_of, self._tail.run(self.learns, self._hearing.listens))
            self._hearing.compare(stages, self._tail.answers)
            self._check_present(output)
        except Exception as error:  # noqa: BLE001 - raised once the other stages know of it
            self._fail(error, "the last stage")
            return None, []
        skeleton, outputs = take_apart(output)
        learns = [tensor.requires_grad for tensor in outputs]
        if any(learns):
            self._outputs = outputs
        else:  # nobody will ask for it
            self._ends, self._tail = {}, None
        stays = [(t.shape, t.dtype) if any(learns) and self._stays(t) else None for t in outputs]
        sent = [tensor for tensor, spec in zip(outputs, stays, strict=True) if spec is None]
        return (skeleton, learns, stays), sent

    def _stays(self, output: Tensor) -> bool:
        """Whether only the last stage gets an output while training: numbers go to all."""
        last = self.model.options.outputs == "last" and not is_tried_out(self.model.model)
        return last and output.numel() > 1

    def _with_those_that_stay(self, stays: Sequence[Any], sent: Sequence[Tensor]) -> list[Tensor]:
        """All outputs, as far as this process has them."""
        model, given = self.model, iter(sent)
        return [
            next(given)
            if spec is None
            else self._outputs[place]
            if model.is_last
            else await_output(spec[0], spec[1], model.device, model.name)
            for place, spec in enumerate(stays)
        ]

    def _backward_end(self, gradients: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
        """Backward through what follows the last stage; returns gradients by micro-batch, of what its stage sent."""
        tail = self._tail
        assert tail is not None
        outputs = [tensor for tensor in self._outputs if tensor.requires_grad]
        back = iter(tail.backward(outputs, gradients))
        self._finish_step(Step(self.model.split.stages, 0), tail)
        merged = [next(back) if learns else None for learns in self._merged.learns]
        for place, arrival in tail.inputs.items():
            self.batch.add_gradient(place, None, arrival.gradient)
        messages = [self._ends.pop(index) for index in range(self.batch.count)]
        self._outputs, self._tail = [], None
        found = separate(merged, self._merged, self._origins, messages, self.model.split)
        rest = [self._ends.pop(index) for index in range(self.batch.count, self.batch.passes)]
        return found + [[torch.zeros_like(tensor) for tensor in message.payload] for message in rest]

    def _recompute(self, step: Step) -> None:
        self._passes[step].run_again()
        self._note_graph(step)

    def _backward_step(self, step: Step, ends: list[list[Tensor | None]], following: Step | None) -> None:
        model, learning = self.model, self._learning(step)
        if step.stage == model.split.stages - 1:
            gradients = ends[step.micro_batch]
        else:
            gradients = model.wire.receive_gradients(model.next, self._way(step.stage + 1, step), learning)
        if following is not None and following.stage < model.split.stages - 1 and self._learning(following):
            model.wire.expect_gradients(model.next, self._way(following.stage + 1, following))
        done = self._passes.pop(step)
        back = done.backward(learning, gradients)
        if step.stage:
            model.wire.send_gradients(model.previous, self._way(step.stage, step), back)
        for place, arrival in done.inputs.items():
            self.batch.add_gradient(place, step.micro_batch, arrival.gradient)
        self._finish_step(step, done)

    def _learning(self, step: Step) -> list[Tensor]:
        """What a step has sent on and gets gradients for; at the last stage, all."""
        sends = self._passes[step].sends
        assert sends is not None
        ends = step.stage == self.model.split.stages - 1
        return [tensor for tensor, learns in zip(sends.payload, sends.learns, strict=True) if learns or ends]

    def _finish_step(self, step: Step, done: Pass) -> None:
        """Let go of a graph whose backward is through, or keep it for the gradients of its weights."""
        if done.weights is None:
            self._graphs.discard(step)
        else:
            self._waiting.append((step, done.weights))
        self.model.note_backward(step.stage, done.weights)

    def _backward_weights(self, waiting: int) -> None:
        """Compute gradients of weights until no more than `waiting` steps wait for it."""
        while len(self._waiting) > waiting:
            step, weights = self._waiting.popleft()
            weights.backward()
            self._graphs.discard(step)

    def _note_graph(self, step: Step) -> None:
        self._graphs.add(step)
        self.model.peak = max(self.model.peak, len(self._graphs))

    def _fail(self, error: Exception, where: str) -> None:
        self._error = error
        self._failure = Failure.of(error, f"{where} of {self.model.split.stages}, on rank {dist.get_rank()}")

    def _check_present(self, output: Any) -> None:
        for path, tensor in tensors(output):
            if isinstance(tensor, Absent):
                raise PrepareError(
                    f"pipeline: output{path} needs {tensor.origin!r} of an earlier stage, which the example did not: "
                    "let strategies.pipeline.example describe inputs with which it does, or ask for it before prepare, "
                    "as by model.config.output_hidden_states = True"
                )
