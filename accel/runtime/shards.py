"""Whole tensors where users have them, parts where processes hold them.

Where a strategy has made parameters DTensors, state dicts made elsewhere still load, and state dicts made here
cannot be pickled by mistake: torch would write this process's part and call it the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from ..errors import CheckpointError

STEP = "step"
"""Under this name torch's optimizers count their steps: a scalar, also where the parameter is one."""


class Elsewhere(nn.Parameter):
    """A parameter that other processes hold: its name, shape, dtype and no values (it is on the meta device).

    It never has a gradient, so that optimizers leave it out by themselves; so do clipping, exchange and checkpoints.
    Its `device` is that of the parameter it was made from: models ask any parameter for theirs.
    """

    _device: torch.device

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_subclass(cls, data.detach().to("meta"), requires_grad)
        made._device = data.device
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where its values would be, if this process had them."""
        return self._device

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Only the dtype changes: there is nothing to move."""
        _, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        return self.detach() if dtype is None else self.detach().type(dtype)

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        """There is nothing to move."""
        return self.detach()

    cuda = cpu

    def __deepcopy__(self, memo: dict[int, Any]) -> Elsewhere:
        copied = memo[id(self)] = Elsewhere(self.data, self.requires_grad)
        copied._device = self._device
        return copied


def divide_like(value: Any, model: Tensor) -> Any:
    """A whole tensor, laid out over the processes as `model` is; what is no whole tensor of its shape stays.

    Every process brings the same tensor; nothing is sent.
    """
    if not isinstance(model, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if value.shape != model.shape:
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def divide_state(kept: Mapping[Any, Any], parameter: Tensor) -> dict[Any, Any]:
    """What an optimizer keeps for a parameter, laid out as the parameter is; the count of its steps stays plain."""
    return {name: value if name == STEP else divide_like(value, parameter) for name, value in kept.items()}


def held_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of which this process holds all or part, each once."""
    return [parameter for parameter in model.parameters() if not isinstance(parameter, Elsewhere)]


def held_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, detached and plain; it shares its memory."""
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).detach()


def like_part(part: Tensor, model: Tensor) -> Tensor:
    """A plain tensor as the part that this process holds of one laid out as `model` is; it shares its memory."""
    if not isinstance(model, DTensor):
        return part
    return DTensor.from_local(
        part, model.device_mesh, model.placements, run_check=False, shape=model.shape, stride=model.stride()
    )


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, plain; all ranks."""
    if not isinstance(tensor, DTensor):
        return tensor
    if not tensor.numel():  # torch gathers none in which a dim after the first is 0
        return held_part(tensor).new_empty(tensor.shape)
    if tensor.is_floating_point() and tensor.itemsize == 1:  # float8, of which backends have not heard
        sent: Any = like_part(held_part(tensor).view(torch.uint8), tensor)
        return whole_tensor(sent).view(tensor.dtype)
    placements = list(tensor.placements)
    # One axis after another: torch warns of what it thinks slow where one call gathers along several.
    for axis in sorted(range(len(placements)), key=lambda axis: (type(placements[axis]) is Shard, -axis)):
        placements[axis] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def accept_whole_model_states(model: nn.Module) -> None:
    """Let `model.load_state_dict` take whole tensors, and keep what `model.state_dict` gives from being pickled."""
    for module in model.modules():
        if any(isinstance(parameter, DTensor | Elsewhere) for parameter in module.parameters(recurse=False)):
            module.register_load_state_dict_pre_hook(_divide_model_state)  # type: ignore[no-untyped-call]
            module.register_state_dict_post_hook(_guard_model_state)  # type: ignore[no-untyped-call]


def accept_whole_optimizer_states(optimizer: Optimizer) -> None:
    """The same for `optimizer.load_state_dict` and `optimizer.state_dict`."""
    optimizer.register_load_state_dict_pre_hook(_divide_optimizer_state)
    optimizer.register_state_dict_post_hook(_guard_optimizer_state)


def _divide_model_state(module: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if prefix + name in state:
            elsewhere = isinstance(parameter, Elsewhere)
            state[prefix + name] = parameter if elsewhere else divide_like(state[prefix + name], parameter)


def _divide_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    places = [place for group in state["param_groups"] for place in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    divided = dict(state["state"])
    for place, parameter in zip(places, parameters, strict=False):  # torch itself says so if they do not fit
        if isinstance(parameter, Elsewhere):
            divided.pop(place, None)
        elif place in divided:
            divided[place] = divide_state(divided[place], parameter)
    return {**state, "state": divided}


def _guard_model_state(module: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    _guard(state[prefix + name] for name, _ in module.named_parameters(recurse=False) if prefix + name in state)


def _guard_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    some = any(isinstance(p, Elsewhere) for group in optimizer.param_groups for p in group["params"])
    _guard((value for kept in state["state"].values() for value in kept.values()), plain_too=some)


def _guard(values: Iterable[Any], plain_too: bool = False) -> None:
    for value in values:
        partial = isinstance(value, DTensor) or (isinstance(value, Tensor) and (plain_too or value.is_meta))
        if partial and not isinstance(value, nn.Parameter):
            value.__reduce_ex__ = _refuse_pickle


def _refuse_pickle(protocol: Any) -> NoReturn:
    raise CheckpointError(
        "state_dict(): the model is divided among the processes, and this holds only a part of it; for the whole, all "
        "ranks call accelerator.get_state_dict(model), or accelerator.save_state(folder)"
    )
