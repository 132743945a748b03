"""ZeRO (Rajbhandari et al. 2020): optimizer state, gradients and parameters divided among the data-parallel processes.

One engine serves the three stages, torch's `fully_shard` (FSDP2): between steps each process holds its part of
every parameter and of what the optimizer keeps for it. The stages differ in how long gathered parameters and whole
gradients live.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from accel.config import setting
from accel.errors import ConfigError
from accel.interfaces import Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from .engine import ShardedModel


class Zero(Strategy):
    """What the three stages share."""

    @dataclass(frozen=True, kw_only=True)
    class Options(Strategy.Options):
        """The settings of every stage."""

        replicas: int = setting(1, minimum=1)
        """Hybrid sharding: the model is divided among size / replicas processes, and each part held by `replicas`."""

        blocks: tuple[str, ...] = ()
        """Modules to gather and free as one, by name (`encoder.layer.*`); by default repeated modules are found."""

        minimum_size: int = setting(100_000, minimum=0)
        """Found blocks with fewer parameters than this are handled together with the rest of the model."""

        prefetch: int = setting(0, minimum=0)
        """Blocks to gather ahead of the one that computes; 0 leaves it to torch: one in backward, none in forward.

        Over gloo, 0 gathers none ahead."""

        reduce_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
        """The type in which gradients are averaged over the processes."""

        gather_dtype: Literal["float32", "compute"] = "float32"
        """Gather weights of linear and convolution layers as they are, or already in the type of mixed_precision.

        `compute` halves the bytes and frees autocast's copies; no layer may then leave autocast for float32."""

        find_unused_parameters: bool = True
        """Let steps, and processes within a step, leave out parameters; off saves one small exchange a step."""

        step_on: Literal["parts", "whole"] = "parts"
        """What an optimizer sees while it steps: the parts that a process holds, or all parameters gathered whole.

        `whole` takes their memory, and that of gradients and optimizer state, for the length of a step. It is for
        optimizers that look at more than one number at a time, such as Muon, Adafactor, LARS and LAMB."""

        broadcast_buffers: bool = True
        """Give every process rank 0's buffers after each exchange, such as batch norm's running statistics."""

        methods: tuple[str, ...] = ()
        """Methods besides forward that use the model's own parameters, and so need them gathered, on all processes."""

        offload: Literal["none", "cpu"] = "none"
        """Where parts of parameters, gradients and optimizer state live: on the device, or in the host's memory."""

        pin_memory: bool | None = None
        """Lock offloaded memory in place, so that copies overlap with work; by default if there is an accelerator."""

        activation_checkpointing: Literal["none", "full", "selective"] = "none"
        """Compute each block's activations again in backward; selective keeps those of matrix products, attention."""

        compile: bool = False
        """Compile each block by torch.compile."""

    hides_parameters = True
    takes_empty = True

    gathers_once: ClassVar[bool] = True
    """Whether gathered parameters stay from forward to backward."""

    gathers_once_a_window: ClassVar[bool] = False
    """Whether gathered parameters stay for all micro-batches of an accumulation window."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.models: dict[nn.Module, ShardedModel] = {}
        self.known: dict[int, nn.Parameter] = {}

    @property
    def name(self) -> str:
        """What error messages call this strategy."""
        return type(self).__name__.lower()

    @classmethod
    def check(cls, options: Any, size: int) -> None:
        if size % options.replicas:
            raise ConfigError(f"replicas: {options.replicas} does not divide {size} processes")
        if 1 < options.replicas == size:
            raise ConfigError(
                f"replicas: {options.replicas} of {size} processes leave nothing to divide; `ddp` replicates"
            )
        if options.pin_memory and options.offload == "none":
            raise ConfigError("pin_memory: is for offloaded memory; set offload: cpu")

    def setup(self, model: nn.Module) -> None:
        from . import checks
        from .engine import ShardedModel

        checks.check_model(model, self)
        self.models[model] = ShardedModel(model, self)

    def before_backward(self, model: nn.Module, loss: Tensor, exchange: bool) -> Tensor:
        self.models[model].before_backward(loss, exchange)
        return loss

    def after_backward(self, model: nn.Module, exchange: bool) -> None:
        self.models[model].after_backward(exchange, alone=len(self.models) == 1)

    def exchange(self, model: nn.Module) -> None:
        self.models[model].exchange_held()

    def settle(self, model: nn.Module) -> None:
        self.models[model].broadcast_buffers()

    def end_passes(self, model: nn.Module) -> None:
        self.models[model].end_passes()

    def check_optimizer(self, optimizer: Optimizer) -> None:
        from . import checks

        if self.models:
            checks.check_optimizer(optimizer, self)

    @property
    def steps_whole(self) -> bool:
        return bool(self.options.step_on == "whole")

    def after_step(self, model: nn.Module) -> None:
        self.models[model].reshard()

    def forget_gradients(self, model: nn.Module, parameters: Collection[nn.Parameter]) -> None:
        self.models[model].forget_gradients(parameters)

    def describe(self, model: nn.Module) -> dict[str, str]:
        return self.models[model].describe()

    def release(self) -> None:
        self.models.clear()
        self.known.clear()

    @property
    def reduce_dtype(self) -> str | None:
        return str(self.options.reduce_dtype)

    @property
    def exchanges_every_micro_batch(self) -> bool:
        """Whether gradients are exchanged even where the optimizer does not step."""
        return False

    @property
    def reshards_after_forward(self) -> bool:
        """Whether gathered parameters are freed after forward and gathered again for backward."""
        return not self.gathers_once


class Zero1(Zero):
    """Divides optimizer state; whole gradients and parameters live for the length of an accumulation window."""

    gathers_once_a_window = True


class Zero2(Zero):
    """Divides optimizer state and gradients; parameters are gathered once for forward and backward."""

    @dataclass(frozen=True, kw_only=True)
    class Options(Zero.Options):
        """The settings of `zero2`."""

        accumulate: Literal["local", "sharded"] = "local"
        """Between optimizer steps, add up whole gradients without exchanging them, or exchange and keep only parts."""

    @property
    def reduce_dtype(self) -> str | None:
        return str(self.options.reduce_dtype)

    @property
    def exchanges_every_micro_batch(self) -> bool:
        return bool(self.options.accumulate == "sharded")


class Zero3(Zero2):
    """Divides optimizer state, gradients and parameters; each block is gathered when it computes, and then freed."""

    @dataclass(frozen=True, kw_only=True)
    class Options(Zero2.Options):
        """The settings of `zero3`."""

        reshard_after_forward: bool = True
        """Free each block after forward and gather it again for backward; off trades memory for bytes, as zero2."""

    gathers_once = False

    @property
    def reshards_after_forward(self) -> bool:
        return bool(self.options.reshard_after_forward)
