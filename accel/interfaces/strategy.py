"""The interface of a strategy: how models are spread over one axis of the mesh of processes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..config import setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from .precision import Precision


class Axis(StrEnum):
    """The axes of the mesh of processes."""

    PIPELINE = "pipeline"
    DATA = "data"
    CONTEXT = "context"
    TENSOR = "tensor"


MESH_ORDER = (Axis.PIPELINE, Axis.DATA, Axis.CONTEXT, Axis.TENSOR)
"""Outermost first: neighbours on the last axis are closest to each other, because they talk most."""

SETUP_ORDER = (Axis.PIPELINE, Axis.TENSOR, Axis.CONTEXT, Axis.DATA)
"""A model is cut into stages, then each layer into parts, then the parts are sharded or replicated."""


class AxisMesh(Protocol):
    """One axis of the mesh, as this process sees it."""

    @property
    def size(self) -> int:
        """Number of processes along the axis."""

    @property
    def index(self) -> int:
        """Position of this process along the axis, from 0."""

    @property
    def group(self) -> ProcessGroup:
        """The processes along the axis; made on first use, by all ranks together."""

    @property
    def device_mesh(self) -> DeviceMesh:
        """The axis as torch's one-dimensional mesh; made on first use, by all ranks together."""


class Strategy:
    """Leaves everything as it is; a plugin overrides what it changes.

    All methods are called by all ranks. A strategy changes models in place: it may replace parameters, but
    `named_parameters()` keeps the user's names. Parameters of which a process holds only a part are DTensors;
    those of which it holds nothing, because others along the axis do, are `accel.runtime.shards.Elsewhere`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """The settings of this strategy, under its name in the config."""

        size: int | None = setting(None, minimum=1)
        """Processes along this axis; by default those that the other strategies leave."""

    axis: ClassVar[Axis] = Axis.DATA
    """The mesh axis that this strategy fills. A run has at most one strategy on each."""

    splits_backward: ClassVar[bool] = False
    """Whether a backward pass reaches parameters in several passes of its own.

    The other strategies then exchange nothing while it runs, but once in `exchange` when it is over.
    """

    places_parameters: ClassVar[bool] = False
    """Whether processes along the axis hold different parameters, each of them whole."""

    waits: ClassVar[bool] = False
    """Whether each forward and each backward pass of a model waits for the others along the axis.

    A pass that leaves gradients exchanged waits with any strategy."""

    hides_parameters: ClassVar[bool] = False
    """Whether a model computes with other tensors than its parameters, so that autograd reaches these by hooks only."""

    takes_empty: ClassVar[bool] = False
    """Whether `setup` takes models without memory, made under `empty_init`, so that none is ever whole.

    It may give what this process holds of `is_empty` parameters memory, of any content, by
    `accel.runtime.deferred.give_memory`; the values come afterwards. Where it runs the model, it does so inside
    `accel.runtime.deferred.runnable`. Else models are filled before."""

    def __init__(self, options: Any, mesh: AxisMesh, device: torch.device, precision: Precision) -> None:
        self.options, self.mesh, self.device, self.precision = options, mesh, device, precision

    @classmethod
    def check(cls, options: Any, size: int) -> None:
        """Raise ConfigError if this strategy cannot run with these options on `size` processes.

        Called before a worker starts; the message begins with the name of the option at fault.
        """

    def setup(self, model: nn.Module) -> None:
        """Spread a model over the axis, in place. It is on the device and converted by the precision.

        Raises PrepareError for a model that this strategy cannot train right.
        """

    def check_model(self, model: nn.Module) -> None:
        """Raise PrepareError if this strategy cannot train a model as all strategies together have left it.

        Called when the last of them has set it up.
        """

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Raise PrepareError if this optimizer cannot update parameters as this strategy has laid them out.

        Called when an optimizer is prepared, and again for those at hand when a model is.
        """

    @property
    def steps_whole(self) -> bool:
        """Whether optimizers are to find parameters, gradients and state whole while they step."""
        return False

    @property
    def reduce_dtype(self) -> str | None:
        """Name of the torch dtype in which gradients are exchanged; None if in that of the parameters."""
        return None

    def before_forward(self, model: nn.Module) -> None:
        """Called at the start of each outermost forward call of a prepared model."""

    def complete_loss(self, loss: Tensor) -> None:
        """Called once before each backward pass, with the loss as the user computed it.

        Where only some processes along the axis know its value, this lets the others know.
        """

    def before_backward(self, model: nn.Module, loss: Tensor, exchange: bool) -> Tensor:
        """Called before each backward pass that may reach the model; returns the loss to run it from.

        `exchange` says whether this pass must leave the gradients of the whole window exchanged; else they are
        only added up on each process.
        """
        return loss

    def after_backward(self, model: nn.Module, exchange: bool) -> None:
        """Called after each such backward pass, on the strategies in reverse order.

        A strategy so finds gradients that have been exchanged along the axes of those set up after it.
        """

    def exchange(self, model: nn.Module) -> None:
        """Exchange the gradients that earlier passes have added up, without a pass of its own."""

    def settle(self, model: nn.Module) -> None:
        """Called before gradients that came from a bare `loss.backward()` are used.

        Makes sure that they have been exchanged. Raises PrepareError if they have not and cannot be.
        """

    def end_passes(self, model: nn.Module) -> None:
        """Called before gradients that no `Accelerator.backward` brought are clipped or used by a step; all ranks.

        Raises PrepareError if another process waits in a bare `loss.backward()` for this one.
        """

    def after_step(self, model: nn.Module) -> None:
        """Called after an optimizer has changed parameters of the model."""

    def forget_gradients(self, model: nn.Module, parameters: Collection[nn.Parameter]) -> None:
        """Called when an optimizer has dropped the gradients of its parameters, some of which may be the model's.

        What was added up without being exchanged, and is kept elsewhere than in `.grad`, goes too.
        """

    def owns(self, parameter: nn.Parameter) -> bool:
        """Whether this process counts a parameter of which it holds all, among those along the axis that do.

        Exactly one says yes, so that a norm over all processes has each parameter once.
        """
        return True

    def describe(self, model: nn.Module) -> dict[str, str]:
        """How the model is held and why: name of a module or parameter -> a few words. For people."""
        return {}

    def release(self) -> None:
        """Forget all models."""
