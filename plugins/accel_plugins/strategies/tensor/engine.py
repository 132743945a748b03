"""One model that is divided: found out how, divided, and held against the whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from accel.errors import PrepareError
from accel.runtime.collectives import broadcast_in_place, gather_object
from accel.runtime.deferred import is_empty, runnable
from accel.runtime.divided import check
from accel.runtime.divided.borders import Borders
from accel.runtime.divided.numbers import Numbers
from accel.runtime.divided.peers import Peers
from accel.runtime.example import Inputs, example_inputs
from accel.runtime.lines import warn
from accel.runtime.shards import held_parameters

from .activations import Activations
from .layer import own_kernels
from .layers import apply
from .observe import Observation, observe
from .plan import SETTING, Decision, Decisions, Planner, groups

if TYPE_CHECKING:
    from .strategy import Tensor

T = TypeVar("T")


class DividedModel:
    """A model, and how each of its layers is held."""

    def __init__(self, model: nn.Module, strategy: Tensor) -> None:
        self.model, self.strategy = model, strategy
        axis = strategy.mesh
        self.group, self.device_mesh = axis.group, axis.device_mesh
        self.peers = Peers(axis.size, axis.index, axis.size, self.group)
        self._modules = dict(model.named_modules())
        self.check_compiled()
        self._check_parameters()
        filled = (parameter for parameter in held_parameters(model) if not is_empty(parameter))
        broadcast_in_place([*filled, *model.buffers()], self.group)
        with runnable(model, strategy.device):
            self._find_division()
        self._check_any()
        self.peers.begins = Borders(model).begin  # at the next forward, when all hooks are there
        self.numbers.share()

    def _find_division(self) -> None:
        """Decide how each layer is held, by running the model, and divide it."""
        model, strategy = self.model, self.strategy
        originals = held_parameters(model)
        inputs = example_inputs(model, strategy.options.example, "strategies.tensor.example")
        with own_kernels():
            self.numbers = Numbers(model, inputs, self.group, strategy.device)
            self.decisions = Planner(model, self._observe(inputs), self.peers.size).decide(strategy.options.plan)
            expected = self._expected(inputs)
            self._divide(inputs, expected)
            self.activations = Activations(model, self.peers, strategy.options)
            if self.activations.settings:
                self._divide_activations(inputs, expected)
        for parameter in originals:
            parameter.data = parameter.data.new_empty(0)  # the core keeps these alive; their memory must not stay

    def _expected(self, inputs: Inputs) -> check.Result:
        """What the whole model gives on the example. Raises PrepareError if it cannot be trained in evaluation mode."""
        try:
            return check.run(self.model, inputs)
        except RuntimeError as error:
            raise PrepareError(
                f"prepare: tensor compares outputs and gradients with those of the whole {type(self.model).__name__}, "
                f"in evaluation mode, where the whole one fails: {str(error).partition(chr(10))[0][:200]}; let it do "
                "there what it does in training, or use `zero3`"
            ) from error

    def check_compiled(self) -> None:
        """Raise PrepareError for a module that is compiled."""
        check.refuse_compiled(self._modules, "strategies.tensor")

    def before_forward(self) -> None:
        """Let replicated activations draw the same dropout masks. Raises PrepareError for what was compiled since."""
        self.check_compiled()
        if self.model.training:
            self.numbers.share()

    def describe(self) -> dict[str, str]:
        """How each layer is held, and why."""
        size = self.strategy.mesh.size
        found = {name: decision.describe(size) for name, decision in self.decisions.items()}
        for name, module in self.model.named_modules():
            if name not in found and next(module.parameters(recurse=False), None) is not None:
                found[name] = Decision("replicate").describe(size)
        self.activations.describe(found)
        return found

    def _observe(self, inputs: Inputs) -> Observation:
        """What all processes saw; looked at again, where the first look tells that outputs are in pieces."""

        def look(pieces: dict[str, int]) -> Observation:
            return Observation.joined(_from_all(observe(self.model, inputs, self.peers.size, pieces)))

        first = look({})
        return first.again(look(first.pieces)) if first.pieces else first

    def _divide(self, inputs: Inputs, expected: check.Result) -> None:
        """Divide the model and compare; where it differs, leave out what does. Raises PrepareError if that fails."""
        if not self._differs(self.decisions, inputs, expected):
            return
        faults = {}
        for group in groups(self.decisions):
            if fault := self._differs(group, inputs, expected):
                faults.update(dict.fromkeys(group, fault))
        for name, fault in faults.items():
            if self.decisions[name].why == SETTING:
                raise PrepareError(f"strategies.tensor.plan: {name!r} cannot be divided: {fault}")
            self.decisions[name] = Decision("replicate", f"divided, it changes {fault}")
        if fault := self._differs(self.decisions, inputs, expected):
            raise PrepareError(
                f"prepare: tensor cannot divide this {type(self.model).__name__}: on an example it changes {fault}; "
                "name the layers to divide in strategies.tensor.plan, or use `zero3`"
            )

    def _check_any(self) -> None:
        """Warn, on the main process, where nothing is divided that the user's plan has not left whole."""
        whole = [name for name, held in self.decisions.items() if held.style == "replicate" and held.why != SETTING]
        if dist.get_rank() or len(whole) < len(self.decisions):
            return
        found = "; ".join(f"{name}: {self.decisions[name].why}" for name in whole[:3]) or "it has no linear layers"
        warn(
            f"tensor divides nothing of this {type(self.model).__name__}, and each of {self.peers.size} processes "
            f"computes all ({found})"
        )

    def _differs(self, decisions: Decisions, inputs: Inputs, expected: check.Result) -> str:
        """How the model differs from the whole one if it is divided so; empty if it does not. Leaves it so."""
        apply(self.model, {name: (d.style, d.pieces) for name, d in decisions.items()}, self.peers, self.device_mesh)
        return self._fault(inputs, expected)

    def _divide_activations(self, inputs: Inputs, expected: check.Result) -> None:
        """Leave sequences and logits divided as the options say, and compare. Raises PrepareError if that fails."""
        activations = self.activations
        activations.begin(self.decisions)
        with activations.where as where:
            self.peers.divided_whole = where.note
            fault = self._fault(inputs, expected)
            self.peers.divided_whole = None
        activations.check(fault, any(_from_all(bool(where.divided))))

    def _fault(self, inputs: Inputs, expected: check.Result) -> str:
        """How the model differs on the example from the whole one, on any process; empty if it does not."""
        try:
            fault = check.compare(check.run(self.model, inputs), expected)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, NotImplementedError) as error:
            fault = f"nothing, but fails: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        return next(filter(None, _from_all(fault)), "")

    def _check_parameters(self) -> None:
        for name, parameter in self.model.named_parameters():
            if isinstance(parameter, DTensor):
                raise PrepareError(
                    f"prepare: tensor cannot divide this {type(self.model).__name__}: parameter {name!r} is already "
                    f"divided over {parameter.device_mesh}; leave that to prepare()"
                )


def _from_all(value: T) -> list[T]:
    """What each process of the run has: stages and replicas of a model must be divided alike."""
    return gather_object(value, dist.group.WORLD)
