"""What loops do with the parameters themselves: read a number, assign to `.data`, draw new values.

Torch does each of these with a DTensor, and without an error, but not to the whole of it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import PrepareError
from .shards import divide_like

_DRAWS = ("normal_", "uniform_", "bernoulli_", "random_", "exponential_", "log_normal_", "cauchy_", "geometric_")
_DRAWS_ALIKE = ("rand_like", "randn_like", "randint_like", "bernoulli", "native_dropout")


def mind_divided_tensors() -> None:
    """Let divided tensors do as whole ones would, or refuse, whatever made them; called for each prepared model."""
    handlers: dict[Any, Any] = DTensor._op_dispatcher._custom_op_handlers
    aten = torch.ops.aten
    handlers[aten._local_scalar_dense.default] = _number
    for name in (*_DRAWS, *_DRAWS_ALIKE):
        packet = getattr(aten, name)
        handlers.update({getattr(packet, overload): _refuse_to_draw for overload in packet.overloads()})
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
