"""Torch's parameter groups of one sharded model: the one place that knows how to reach FSDP2's insides.

A group is what is gathered, reduced and freed as one: a block, or the rest of the model. Torch has no public way
to reach them; the names used here are the same from 2.11 on, but for the one that `_groups_of` looks after.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Set
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from accel.errors import PrepareError

from .scalars import Places, narrow, repeat_gradient
from .watch import Watch

_AUTOCAST = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}
"""Layers whose parameters autocast converts to the type that it computes in, and that do nothing else with them."""


class Groups:
    """All groups of a model that `fully_shard` was applied to, in the order in which forward needs them.

    `all` begins with the group of what no block holds, if there is such; `rest` is that one or none.
    """

    kept = False
    """Whether a graph is alive whose second derivative torch would not gather for."""

    def __init__(self, model: nn.Module, scalars: Places, gather_dtype: torch.dtype | None = None) -> None:
        assert isinstance(model, FSDPModule)
        self.root: Any = model._get_fsdp_state()
        if gather_dtype is not None:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    _narrow(groups_of(module._get_fsdp_state()), gather_dtype)
        self.root._lazy_init()
        self.states: list[Any] = list(self.root._state_ctx.all_states)
        self.rest: list[Any] = groups_of(self.root)
        self.all: list[Any] = [group for state in self.states for group in groups_of(state)]
        for parameter in self.parameters():
            narrow(parameter, scalars)
        self._hidden: set[Any] = set()
        self._reshards = {group: group.post_forward_mesh_info for group in self.all}
        self._watches = {group: Watch(group) for group in self.all}
        for group in self.all:
            group.pre_forward = functools.partial(self._shown, group, group.pre_forward)
            group.pre_backward = functools.partial(self._shown, group, group.pre_backward)

    def parameters(self) -> Iterator[Any]:
        """Torch's record of each parameter, in order."""
        for group in self.all:
            yield from group.fsdp_params

    def reshard(self) -> None:
        """Free all gathered parameters."""
        for group in self.all:
            group._to_sharded()

    def keep(self, kept: bool) -> None:
        """Let what is gathered stay after a forward, for the second derivative of one before; or again not."""
        self.kept = kept
        for group, reshards in self._reshards.items():
            group.post_forward_mesh_info = None if kept else reshards

    def gather(self) -> None:
        """Gather all parameters, in order; all ranks."""
        for group in self.all:
            group.unshard()
            group.wait_for_unshard()

    def is_whole(self, group: Any) -> bool:
        """Whether a forward would find a group gathered, and as it is."""
        return bool(group.is_unsharded and not self._watches[group].outdated)

    def hide(self) -> None:
        """Let the model show its divided parameters, though gathered ones stay for the forward or backward to come.

        Else a loop would see either, depending on the moment: an optimizer or a clipping made with gathered ones
        would do nothing.
        """
        for group in self.all:
            if group.is_unsharded and group not in self._hidden:
                self._hidden.add(group)
                for parameter in group.fsdp_params:
                    parameter._setattr_on_modules(parameter.sharded_param)

    def _shown(self, group: Any, inner: Callable[..., Any], *args: Any) -> Any:
        """Let a module compute with gathered parameters that `hide` had hidden."""
        _check_own(group)
        if self._watches[group].outdated:
            group._to_sharded()
        if group in self._hidden:
            self._hidden.discard(group)
            if group.is_unsharded:
                for parameter in group.fsdp_params:
                    parameter.to_unsharded()
        return inner(*args)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients: the parts, and what was added up without being exchanged."""
        self.forget({id(parameter.sharded_param) for parameter in self.parameters()})
        for parameter in self.parameters():
            if set_to_none:
                parameter.sharded_param.grad = None
            elif parameter.sharded_param.grad is not None:
                parameter.sharded_param.grad.zero_()

    def forget(self, parameters: Set[int]) -> None:
        """Forget what was added up for the parameters with these ids without being exchanged."""
        for parameter in self.parameters():
            if id(parameter.sharded_param) in parameters:
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):
                    parameter._unsharded_param.grad = None

    def rest_gathered(self) -> None:
        """After a backward pass that leaves no gradients: be ready for one through what has been gathered."""
        for holder in (*self.states, *self.all):
            if holder._training_state != TrainingState.FORWARD:  # a pass may run in the middle of a forward
                holder._training_state = TrainingState.IDLE
        self.root._state_ctx.post_backward_final_callback_queued = False
        if self.idle:
            self.hide()

    def stepped(self) -> None:
        """Free all gathered parameters, which an optimizer has changed."""
        self.keep(False)
        self.reshard()
        for watch in self._watches.values():
            watch.compares = False

    @property
    def idle(self) -> bool:
        """Whether neither forward nor backward is under way in the outermost module."""
        return bool(self.root._training_state == TrainingState.IDLE)

    @property
    def interrupted(self) -> bool:
        """Whether a forward that has ended, by an exception, was never finished."""
        return bool(self.root._training_state == TrainingState.FORWARD)

    def recover(self) -> None:
        """Be ready for the next forward after an exception ended one."""
        for state in self.states:
            state._training_state = TrainingState.IDLE
        for group in self.all:
            group._training_state = TrainingState.IDLE
            group.wait_for_unshard()
            group._post_forward_indices.clear()
        self.root._state_ctx.iter_forward_root = None
        self.root._comm_ctx.all_gather_state = None
        self.root._comm_ctx.post_forward_order.clear()
        for watch in self._watches.values():
            watch.free()


def _check_own(group: Any) -> None:
    """Raise PrepareError if modules have other parameters than those of which torch knows, or of another type.

    Torch would put its own back. `torch.func.functional_call` is such a case, and assigning a new parameter.
    """
    for parameter in group.fsdp_params:
        if parameter.sharded_param.dtype != parameter.orig_dtype:
            raise PrepareError(
                f"forward: parameter {parameter._param_fqn!r} became {parameter.sharded_param.dtype} after prepare(); "
                "convert the model before it, or set mixed_precision"
            )
        info = parameter._module_info
        found = info.module._parameters.get(info.param_name)
        if found is not parameter.sharded_param and found is not getattr(parameter, "_unsharded_param", None):
            raise PrepareError(
                f"forward: {parameter._param_fqn!r} is not the parameter that was prepared: it was replaced, as "
                "torch.func.functional_call does; divided parameters cannot be, so change them in place, or use "
                "`strategies: ddp`"
            )


def _narrow(groups: list[Any], dtype: torch.dtype) -> None:
    """Gather in `dtype` what autocast would convert to it anyway, at every use."""
    for group in groups:
        for parameter in group.fsdp_params:
            info = parameter._module_info
            if all(type(module) in _AUTOCAST for module in (info.module, *info.shared_modules)):
                parameter.init_dtype_attrs = functools.partial(_init_narrow, parameter, dtype)


def _init_narrow(parameter: Any, dtype: torch.dtype, policy: Any) -> None:
    type(parameter).init_dtype_attrs(parameter, policy)
    parameter.param_dtype = dtype if parameter.orig_dtype == torch.float32 else None


def make_gradients_alike(group: Any) -> None:
    """Bring gradients to the shape and type in which they are reduced: torch reduces those of one type together."""
    for parameter in group.fsdp_params:
        if hasattr(parameter, "_unsharded_param"):
            parameter.accumulate_unsharded_grad_if_needed()
            parameter.to_accumulated_grad_if_needed()
            if not parameter.sharded_param.dim():
                repeat_gradient(parameter)


def whole_gradient(parameter: Any) -> Any:
    """The gradient that this process has accumulated and not yet exchanged; None if there is none."""
    if parameter.unsharded_accumulated_grad is not None:
        return parameter.unsharded_accumulated_grad
    return parameter._unsharded_param.grad if hasattr(parameter, "_unsharded_param") else None


def begin_again(state: Any, *unused: Any) -> None:
    """A forward begins while torch believes in a backward pass, of which this module's own part is over.

    So stages of a pipeline compute activations again. Torch would take it for a checkpoint inside of the backward pass,
    for which it neither gathers nor frees.
    """
    groups = groups_of(state)
    if groups and all(group._training_state == TrainingState.POST_BACKWARD for group in groups):
        for holder in (state, *groups):
            holder._training_state = TrainingState.IDLE


def groups_of(state: Any) -> list[Any]:
    """Torch's own groups of one module, of which 2.11 knows one at most."""
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return list(several)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []
