"""What loops do with the parameters themselves: compute with the batch, read a number, assign to `.data`, draw values.

Torch does each of these with a DTensor, most without an error, but not as with the whole of it.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import PrepareError
from .shards import divide_like, held_part, whole_tensor

_DRAWS = ("normal_", "uniform_", "bernoulli_", "random_", "exponential_", "log_normal_", "cauchy_", "geometric_")
_OPERATORS = ("add", "sub", "mul", "truediv", "pow", "matmul")
_DRAWS_ALIKE = ("rand_like", "randn_like", "randint_like", "bernoulli", "native_dropout")


def mind_divided_tensors(model: nn.Module) -> None:
    """Let divided tensors do as whole ones would, or refuse, whatever made them; called for each prepared model."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            _mind_gradient(parameter)
    handlers: dict[Any, Any] = DTensor._op_dispatcher._custom_op_handlers
    aten = torch.ops.aten
    handlers[aten._local_scalar_dense.default] = _number
    for name in (*_DRAWS, *_DRAWS_ALIKE):
        packet = getattr(aten, name)
        handlers.update({getattr(packet, overload): _refuse_to_draw for overload in packet.overloads()})
    _mind_operators()
    DTensor.data = property(Tensor.detach, _assign)  # type: ignore[assignment]


def _number(op_call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`item`, `float`, `int`, `bool`: torch gives this process's share, as of `parameter.norm().item()`.

    To put the shares together takes all processes, and a loop may ask on one of them alone.
    """
    tensor: DTensor = args[0]
    if not all(placement.is_replicate() for placement in tensor.placements):
        raise PrepareError(
            "item(): each process has only its share of this number, as the model is divided among them; for the whole "
            "all ranks call .full_tensor().item()"
        )
    return tensor._local_tensor.item()


def _refuse_to_draw(op_call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
    """Each process would draw for its own part, from a generator that is as the others' are or is not."""
    name = op_call._schema.name.partition("::")[2]
    raise PrepareError(
        f"{name}: random numbers for a divided tensor of shape {tuple(args[0].shape)} would depend on the number of "
        "processes; draw them before prepare(), or for a whole tensor and load_state_dict() it"
    )


class _LayOut:
    """Lets gradients be divided as the parameter is, which torch may have made whole.

    So it would where it copies one that is divided unevenly (2.11), as it does on some processes and not on others:
    what it gets here, it need not copy. No reference to the parameter is kept: with one, even a weak one, torch could
    not convert it.
    """

    def __init__(self, parameter: Any) -> None:
        self.mesh, self.placements = parameter.device_mesh, parameter.placements
        self.sizes = {"shape": parameter.shape, "stride": parameter.stride()}
        axes = zip(self.placements, self.mesh.shape, strict=True)
        self.even = all(parameter.shape[p.dim] % size == 0 for p, size in axes if p.is_shard())

    def __call__(self, gradient: Any) -> Any:
        if self.even and gradient.placements == self.placements:
            return gradient
        gradient = gradient.redistribute(placements=self.placements)
        if gradient.requires_grad:
            return gradient
        part = held_part(gradient).contiguous()
        return DTensor.from_local(part, self.mesh, self.placements, run_check=False, **self.sizes)


def _mind_gradient(parameter: nn.Parameter) -> None:
    trains = parameter.requires_grad
    parameter.requires_grad_()  # hooks stay when that is changed, but can only be added while it holds
    parameter.register_hook(_LayOut(parameter))  # type: ignore[no-untyped-call]
    parameter.requires_grad_(trains)


def gradient_hooks(parameter: Tensor) -> list[Any]:
    """What a loop has registered to be called with a divided parameter's gradients, which it may replace."""
    return [hook for hook in (parameter._backward_hooks or {}).values() if not isinstance(hook, _LayOut)]


@functools.cache
def _mind_operators() -> None:
    for name in _OPERATORS:
        for method in (f"__{name}__", f"__r{name}__"):
            setattr(DTensor, method, _with_whole(getattr(DTensor, method)))


def _with_whole(operator: Any) -> Any:
    """An operator that gathers a divided tensor to compute with a plain one, such as a batch or a loss.

    Torch refuses, or, if that is a single number, believes it to be the same on all processes. Optimizers, which learn
    nothing from it, rely on that.
    """

    @functools.wraps(operator)
    def compute(divided: DTensor, other: Any) -> Any:
        if not isinstance(other, Tensor) or isinstance(other, DTensor):
            return operator(divided, other)
        learns = torch.is_grad_enabled() and (divided.requires_grad or other.requires_grad)
        alike = other.numel() == 1 and divided.numel() > 1 and not learns
        return operator(divided if alike else whole_tensor(divided), other)

    return compute


@torch.no_grad()
def _assign(tensor: DTensor, value: Tensor) -> None:
    """`tensor.data = value`, whole or divided alike: torch would change the outer tensor alone, which has no values."""
    part = divide_like(value, tensor)
    alike = isinstance(part, DTensor) and (part.placements, part.dtype, part.shape) == (
        tensor.placements,
        tensor.dtype,
        tensor.shape,
    )
    if not alike:
        raise PrepareError(
            f".data: expected a tensor of shape {tuple(tensor.shape)} and {tensor.dtype}, whole or divided as the "
            f"parameter is, got {tuple(value.shape)}, {value.dtype}"
        )
    tensor.copy_(part)
