"""One model in stages: what this process holds of it, and the forward that takes the place of the model's own."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accel.errors import PrepareError
from accel.runtime.adopt import own_method
from accel.runtime.collectives import broadcast_in_place
from accel.runtime.deferred import is_empty, runnable
from accel.runtime.divided.operators import once

from .absent import absent_parameter
from .batches import Batch
from .flight import Flight
from .nest import put_together
from .outputs import Awaited
from .outside import listen
from .plan import make_plan
from .questions import Questions
from .states import OwnBuffers
from .streams import Streams
from .tied import Tied
from .weights import Weights
from .wire import Wire

if TYPE_CHECKING:
    from .strategy import Pipeline


class StagedModel:
    """A model whose stages are on the processes along the pipeline, in place; all ranks make one together."""

    def __init__(self, model: nn.Module, strategy: Pipeline) -> None:
        self.model, self.precision, self.options = model, strategy.precision, strategy.options
        self.rank, self.ranks, self.device = strategy.mesh.index, strategy.mesh.size, strategy.device
        self.name = type(model).__name__
        self.recomputes = strategy.options.schedule == "1f1b"
        self.weights_wait = strategy.options.schedule == "zero_bubble"
        self.micro_batches = strategy.options.micro_batches or 2 * self.ranks
        self.among_others = dist.get_world_size() > self.ranks
        """Whether others may gather parameters with these processes, and so must go through as many passes."""
        self.streams, self.wire = Streams(self.device), Wire(strategy.mesh.group, self.device)
        filled = (parameter for parameter in model.parameters() if not is_empty(parameter))
        broadcast_in_place([*filled, *model.buffers()], strategy.mesh.group)
        self.own_forward = own_method(model, "forward")
        with runnable(model, self.device):
            self.plan = make_plan(model, strategy)
            self.split, self.parts, self.layout = self.plan.split, self.plan.stage, self.plan.layout
            self.holders = self._find_holders()
            self._let_go()
        self.own_buffers = OwnBuffers(model, self.plan.changes.own)
        self.questions = Questions(self.name, self.split.stages - 1)
        self._names: dict[int, tuple[str, nn.Parameter]] = {}
        self.tied = Tied(model, {name: h for name, h in self.holders.items() if len(h) > 1}, self.wire)
        listen(self)
        model.forward = functools.wraps(self.own_forward)(lambda *args, **kwargs: self.forward(*args, **kwargs))
        model.__dict__["__deepcopy__"] = self._refuse_copy
        self.peak = 0
        """Most micro-batches whose graph this process has held at once."""
        self._together: dict[int, str] = {}

    @property
    def is_last(self) -> bool:
        """Whether this process has the last stage."""
        return self.rank == self.ranks - 1

    @property
    def next(self) -> int:
        """The process of the stage after one of this process's."""
        return (self.rank + 1) % self.ranks

    @property
    def previous(self) -> int:
        """The process of the stage before one of this process's."""
        return (self.rank - 1) % self.ranks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, in micro-batches through all stages; returns the whole output on all processes."""
        if torch.is_inference_mode_enabled():  # whose tensors tell no changes in place
            with torch.inference_mode(False), torch.no_grad():
                return self.forward(*args, **kwargs)
        batch = Batch(self.own_forward, args, kwargs, self.layout, self.micro_batches, self.among_others)
        learns = torch.is_grad_enabled()
        self.tied.watch()
        flight = Flight(self, batch, learns)
        skeleton, values, learning = flight.forward()
        self.own_buffers.share(self.wire.group, self.ranks - 1)
        if learns and any(learning):
            inputs = [batch.tensors[place] for place in batch.learning()]
            anchor = torch.zeros((), requires_grad=True)
            made = iter(_Land.apply(flight, values, learning, anchor, *inputs))  # type: ignore[no-untyped-call]
            values = [next(made) if learns else value for value, learns in zip(values, learning, strict=True)]
        return put_together(skeleton, values)

    def describe(self) -> dict[str, str]:
        """Which stages hold each part, and why."""
        last = self.split.stages
        told = {}
        for part, places in self.split.places.items():
            stages = ", ".join("the end" if stage == last else f"stage {stage}" for stage in dict.fromkeys(places))
            why = (
                "first block of its stage"
                if self.plan.begins_stage(part)
                else "block"
                if part in self.plan.blocks
                else "called there"
            )
            told[part] = f"{stages} ({why})"
        for name, holders in self.holders.items():
            if len(holders) > 1:
                told[name] = f"on processes {', '.join(map(str, holders))} of the pipeline, whose gradients are summed"
        for stage, said in self._together.items():
            told["the end" if stage == last else f"stage {stage}"] = said
        return told

    def note_backward(self, stage: int, weights: Weights | None) -> None:
        """Remember of the first backward through a stage which gradients did not wait, for `describe`."""
        if not self.weights_wait or stage in self._together or not stage:
            return
        if weights is None:
            self._together[stage] = "backward in one: a compiled or recomputed part runs once only"
            return
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        found = [names.get(id(leaf), "a part of a sharded one") for leaf in weights.together if leaf.dim() > 1]
        self._together[stage] = "gradients of weights wait" + (f", but not of {', '.join(found)}" if found else "")

    def _refuse_copy(self, memo: Any) -> NoReturn:
        raise PrepareError(
            f"copy.deepcopy: this {self.name} is divided among the processes and cannot be copied; copy it, or make "
            "its AveragedModel, before prepare() and prepare that too; for its weights, call get_state_dict()"
        )

    def owner_of(self, parameter: nn.Parameter) -> int | None:
        """The first process along the pipeline that holds a parameter; None if it is not of this model."""
        known = self._names.get(id(parameter))
        if known is None or known[1] is not parameter:
            self._names = {id(p): (name, p) for name, p in self.model.named_parameters()}  # they may be sharded by now
            known = self._names.get(id(parameter))
        return self.holders[known[0]][0] if known is not None else None

    def share_buffers(self) -> None:
        """Give all processes the buffers that their stage has changed."""
        for buffer, part in self.plan.changes.parts.items():
            if self.model.training:
                source = self.split.stage_of(part, len(self.split.places.get(part, ())), 0) % self.ranks
                broadcast_in_place([self.model.get_buffer(buffer)], self.wire.group, source)

    def _find_holders(self) -> dict[str, list[int]]:
        """Which processes along the pipeline hold each parameter; those of parts that the example left out, all."""
        stages: dict[str, set[int]] = {name: set() for name, _ in self.model.named_parameters()}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for part, places in self.split.places.items():
            for parameter in self.plan.parts[part].parameters():
                stages[names[id(parameter)]].update(places)
        for stage, needed in enumerate(self.split.parameters):
            for name in needed:
                stages[name].add(stage)
        everyone = set(range(self.ranks))
        return {name: sorted({self.rank_of(stage) for stage in found} or everyone) for name, found in stages.items()}

    def rank_of(self, stage: int) -> int:
        """The process of a stage; that of the end has the last."""
        return min(stage, self.split.stages - 1) % self.ranks

    def _let_go(self) -> None:
        """Keep of parameters that only other processes hold the names and shapes."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        stand_ins: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for attribute, parameter in module._parameters.items():
                if parameter is not None and self.rank not in self.holders.get(
                    names.get(id(parameter), ""), [self.rank]
                ):
                    made = stand_ins.setdefault(id(parameter), absent_parameter(parameter, names[id(parameter)]))
                    module._parameters[attribute] = made
                    self._emptied = [*getattr(self, "_emptied", ()), parameter]
        for parameter in getattr(self, "_emptied", ()):
            parameter.data = parameter.data.new_empty(0)  # the core keeps these alive; their memory must not stay


class _Land(torch.autograd.Function):
    """The whole pipeline as one node of the user's graph."""

    @staticmethod
    def forward(
        ctx: Any, flight: Flight, values: list[Tensor], learning: list[bool], anchor: Tensor, *inputs: Tensor
    ) -> Any:
        ctx.flight = flight
        ctx.set_materialize_grads(False)  # what only an unused output is made with has no gradient, rather than zeros
        made = [value for value, learns in zip(values, learning, strict=True) if learns]
        ctx.known = {place for place, value in enumerate(made) if not isinstance(value, Awaited)}
        return tuple(value.detach() for value in made)

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (None, None, None, None, *ctx.flight.backward(gradients))
