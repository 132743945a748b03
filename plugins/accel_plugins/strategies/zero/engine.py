"""One model under torch's `fully_shard`, and what has to be repaired around it."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from accel.errors import PrepareError
from accel.runtime.collectives import broadcast_in_place
from accel.runtime.deferred import give_memory
from accel.runtime.nested import map_tensors
from accel.runtime.shards import Elsewhere, held_parameters, held_part

from .blocks import find_blocks
from .comm import improve_collectives
from .entries import Entries
from .exchange import Exchange
from .groups import Groups
from .memory import Spare
from .recompute import checkpoint_activations
from .scalars import widen
from .wholes import Wholes

if TYPE_CHECKING:
    from .strategy import Zero


class ShardedModel:
    """A model whose parameters are divided among the processes, in place; all ranks make one together."""

    def __init__(self, model: nn.Module, strategy: Zero) -> None:
        self.model, self.strategy, self.options = model, strategy, strategy.options
        self.exchange: Exchange | None = None
        blocks = self._find_blocks()
        self._improve_blocks(blocks)
        if not self._divides:
            give_memory(model, strategy.device)
            return
        for parameter in held_parameters(model):
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
        self._broadcast([*(p for p in held_parameters(model) if not p.is_meta), *model.buffers()])
        if not held_parameters(model):
            return
        blocks = [block for block in blocks if held_parameters(block)]
        scalars = widen(model, strategy.mesh.size // self.options.replicas)
        self._shard(blocks)
        give_memory(model, strategy.device if self.options.offload == "none" else torch.device("cpu"))
        self.groups = Groups(model, scalars, self._gather_dtype)
        strategy.known |= {id(parameter): parameter for parameter in model.parameters()}
        self.spare = Spare() if strategy.reshards_after_forward else None
        improve_collectives(self.groups.all, strategy.device, self.spare)
        gathers = strategy.reshards_after_forward
        wholes = Wholes.along(self._mesh, strategy.mesh.group)
        self.exchange = Exchange(self.groups, wholes, self.options.find_unused_parameters, gathers)
        entries = Entries(model, blocks, self.exchange)
        entries.wrap_methods(self.options.methods)
        entries.explain_methods(f"strategies.{strategy.name}.methods")
        entries.explain_forward(f"strategies.{strategy.name}.blocks")
        if self.options.find_unused_parameters:
            entries.gather_in_order()
        model.zero_grad = self.groups.zero_grad  # type: ignore[method-assign]
        self._refuse_copies()

    def before_backward(self, loss: Tensor, exchange: bool) -> None:
        """Say whether the backward pass from `loss` exchanges gradients, and what becomes of gathered parameters."""
        if self.exchange is not None:
            exchanges = exchange or self.strategy.exchanges_every_micro_batch
            reshard = exchanges or not self.strategy.gathers_once_a_window
            self.exchange.begin(loss, exchanges, reshard, met=exchange)

    def after_backward(self, exchange: bool, alone: bool) -> None:
        """Make up for an exchange that this process's loss did not set off, and give all the same buffers."""
        if self.exchange is not None:
            self.exchange.end(alone)
        if exchange:
            self.broadcast_buffers()

    def exchange_held(self) -> None:
        """Exchange the gradients that earlier passes have added up, without a pass of its own."""
        if self.exchange is not None:
            self.exchange.run()
        self.broadcast_buffers()

    def end_passes(self) -> None:
        """Make sure that no process waits for this one in a bare `loss.backward()`; all ranks."""
        if self.exchange is not None:
            self.exchange.end_passes()

    def broadcast_buffers(self) -> None:
        """Give every process rank 0's buffers."""
        if self._divides and self.options.broadcast_buffers and self.model.training:
            self._broadcast(list(self.model.buffers()))

    def reshard(self) -> None:
        """Free gathered parameters: the next forward must see what the optimizer made of them."""
        if self.exchange is not None:
            self.groups.stepped()
            if self.spare is not None:
                self.spare.drop()

    def forget_gradients(self, parameters: Collection[nn.Parameter]) -> None:
        """Drop what was added up for these parameters and not exchanged."""
        if self.exchange is not None:
            self.groups.forget(set(map(id, parameters)))

    def describe(self) -> dict[str, str]:
        """What is gathered as one, by the name of its module, and why."""
        if self.exchange is None:
            return {}
        names = {id(module): name for name, module in self.model.named_modules()}
        shards = self.strategy.mesh.size // self.options.replicas
        found = {}
        for group in self.groups.all:
            first = next(names[id(module)] for module in group.modules)
            count = sum(math.prod(parameter._orig_size) for parameter in group.fsdp_params)
            why = "one of the repeated blocks" if first else "what no block holds"
            found[first] = f"{count:,} parameters gathered as one, {why}; divided among {shards} processes"
        return found

    @property
    def _divides(self) -> bool:
        return self.strategy.mesh.size > 1 or self.options.offload != "none"

    @property
    def _gather_dtype(self) -> torch.dtype | None:
        dtype: torch.dtype = getattr(torch, self.strategy.precision.dtype)
        return dtype if self.options.gather_dtype == "compute" and dtype is not torch.float32 else None

    def _find_blocks(self) -> list[nn.Module]:
        setting = f"strategies.{self.strategy.name}.blocks"
        return find_blocks(self.model, self.options.blocks, self.options.minimum_size, setting)

    def _improve_blocks(self, blocks: list[nn.Module]) -> None:
        """Recompute and compile block by block: what is gathered as one is what computes as one."""
        options = self.options
        for wanted, setting in (
            (options.activation_checkpointing != "none", "activation_checkpointing"),
            (options.compile, "compile"),
        ):
            if wanted and not blocks:
                raise PrepareError(
                    f"strategies.{self.strategy.name}.{setting}: found no repeated blocks in this "
                    f"{type(self.model).__name__}; name them with strategies.{self.strategy.name}.blocks, "
                    "or lower minimum_size"
                )
        for block in blocks:
            if options.activation_checkpointing != "none":
                checkpoint_activations(block, selective=options.activation_checkpointing == "selective")
            if options.compile:
                block.compile()

    def _shard(self, blocks: list[nn.Module]) -> None:
        self.strategy.known |= {id(parameter): parameter for parameter in held_parameters(self.model)}
        policy: dict[str, Any] = {
            "mesh": self._mesh,
            "mp_policy": MixedPrecisionPolicy(
                reduce_dtype=getattr(torch, self.options.reduce_dtype), cast_forward_inputs=False
            ),
            "offload_policy": self._offload_policy(),
            "ignored_params": {p for p in self.model.parameters() if isinstance(p, Elsewhere)},
        }
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # see `_own_outputs`
        for block in blocks:
            block.register_forward_hook(_own_outputs, prepend=True)
            again = self.strategy.reshards_after_forward and block is not blocks[-1]  # which backward begins with
            _divide(block, reshard_after_forward=again, **policy)
        _divide(self.model, reshard_after_forward=False, **policy)
        self._prefetch(blocks)
        divided = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for module in divided:
            _keep_name(type(module))

    def _prefetch(self, blocks: list[Any]) -> None:
        """Let each block gather those that are needed after it, nearest first."""
        depth = self.options.prefetch
        if depth:
            for index, block in enumerate(blocks):
                block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + depth])
                block.set_modules_to_backward_prefetch(blocks[max(index - depth, 0) : index][::-1])

    @functools.cached_property
    def _mesh(self) -> DeviceMesh:
        """The data axis; with replicas, split into a grid of replicas and shards."""
        axis, replicas = self.strategy.mesh, self.options.replicas
        if replicas == 1:
            return axis.device_mesh
        return axis.device_mesh._unflatten(0, (replicas, axis.size // replicas), ("replicas", "shards"))

    def _offload_policy(self) -> OffloadPolicy:
        if self.options.offload == "none":
            return OffloadPolicy()
        able = torch.accelerator.is_available()
        if self.strategy.steps_whole and self.strategy.device.type != "cpu":
            raise PrepareError(
                f"strategies.{self.strategy.name}.step_on: whole does not go with offload: cpu, whose parts lie where "
                "the device's collectives cannot reach them; leave one out"
            )
        if self.options.pin_memory and not able:
            raise PrepareError(
                f"strategies.{self.strategy.name}.pin_memory: needs an accelerator, and there is none; leave it out"
            )
        return CPUOffloadPolicy(pin_memory=able if self.options.pin_memory is None else self.options.pin_memory)

    def _broadcast(self, tensors: list[Tensor]) -> None:
        if self.strategy.mesh.size > 1 and tensors:
            held = [held_part(tensor) for tensor in tensors]
            broadcast_in_place(held, self.strategy.mesh.group)

    def _refuse_copies(self) -> None:
        """Say what to call instead of copying a divided model, which torch cannot."""
        name = type(self.model).__name__

        def refuse(memo: Any) -> None:
            raise PrepareError(
                f"copy.deepcopy: this {name} is divided among the processes and cannot be copied; copy it, or make its "
                "AveragedModel, before prepare() and prepare both, whose parameters then pair up, or prepare another "
                "one and call its load_state_dict(model.state_dict()); for whole weights, call get_state_dict(model)"
            )

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.__dict__["__deepcopy__"] = refuse


def _divide(module: nn.Module, **policy: Any) -> None:
    """Let torch divide what of a module is whole, and free that: the core keeps the parameters themselves alive."""
    before = dict(module.named_parameters())
    fully_shard(module, **policy)
    after = set(map(id, module.parameters()))
    for parameter in before.values():
        if id(parameter) not in after:
            whole = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
            whole.data = whole.data.new_empty(0)


def _own_outputs(block: nn.Module, args: Any, output: Any) -> Any:
    """Give a block's output that is a view memory of its own.

    Where a loop changes a view in place, torch drops the hook that gathers the block for backward. What no block
    holds stays gathered until backward, so that there a view does no harm.
    """
    return map_tensors(lambda t: t.clone() if t.requires_grad and t._base is not None else t, output)


def _keep_name(divided: type[Any]) -> None:
    """Let the class that torch derives for a divided module be called what the user's own is called."""
    own = divided.__mro__[2]
    divided.__name__, divided.__qualname__, divided.__module__ = own.__name__, own.__qualname__, own.__module__
