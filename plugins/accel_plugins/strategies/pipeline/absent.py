"""Tensors whose values another stage has.

They have a shape, a dtype and a device, take no memory, and what is computed from them is absent too and costs
nothing. Whoever asks for their values is refused: the alternative, zeros of the right shape, would be a wrong number
that nobody notices.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from accel.errors import PrepareError
from accel.runtime.shards import Elsewhere

_aten = torch.ops.aten
FRESH = {
    _aten.zeros_like,
    _aten.ones_like,
    _aten.empty_like,
    _aten.full_like,
    _aten.new_zeros,
    _aten.new_ones,
    _aten.new_empty,
    _aten.new_full,
}
"""What takes nothing but the shape of a tensor: its result is not absent."""


class _Dispatched:
    """Computes shapes where torch would compute values."""

    _device: torch.device
    origin: str
    """The name of the module or parameter, on another stage, that the values are missing of."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        """The device on which the values would be."""
        return self._device

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(function, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise PrepareError(
            f"{self.origin}: is on another pipeline stage, and cannot be copied or pickled here; for the weights of "
            "the whole model, all ranks call accelerator.get_state_dict(model)"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.origin})"


class Absent(_Dispatched, Tensor):  # type: ignore[misc,override]
    """A value of the forward pass that this stage has not."""


class AbsentParameter(_Dispatched, Elsewhere):  # type: ignore[misc,override]
    """A parameter that other stages hold."""


def absent(shape: Any, dtype: torch.dtype, device: torch.device, origin: str) -> Absent:
    """An absent tensor; `origin` names whose result it is."""
    return _mark(torch.empty(shape, dtype=dtype, device="meta"), device, origin)


def absent_parameter(parameter: Tensor, name: str) -> AbsentParameter:
    """What stands in for a parameter that other stages hold."""
    made = AbsentParameter(parameter, parameter.requires_grad)
    made.origin = name
    return made


def _mark(meta: Tensor, device: torch.device, origin: str) -> Absent:
    made: Absent = torch.Tensor._make_subclass(Absent, meta)
    made._device, made.origin = device, origin
    return made


def _dispatch(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _Dispatched)]
    device, origin = given[0]._device, given[0].origin
    if function.overloadpacket in FRESH:
        like = torch.empty((), dtype=args[0].dtype, device=device).expand(args[0].shape)
        return function(like, *args[1:], **kwargs)
    _refuse_writes(function, args, origin)
    meta_args, meta_kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
    if meta_kwargs.get("device") is not None:
        device, meta_kwargs["device"] = torch.device(meta_kwargs["device"]), torch.device("meta")
    try:
        result = function(*meta_args, **meta_kwargs)
    except (RuntimeError, NotImplementedError) as error:
        raise PrepareError(
            f"pipeline: {function} needs values of {origin!r}, which is on another stage: {error}. If it is needed "
            "only for some inputs, let strategies.pipeline.example describe such"
        ) from error
    if function._schema.is_mutable:
        return args[0]
    return tree_map_only(Tensor, lambda meta: _mark(meta, device, origin), result)


def _refuse_writes(function: Any, args: Any, origin: str) -> None:
    """Refuse to change a tensor that is here by values that are not."""
    if function._schema.is_mutable and isinstance(args[0], Tensor) and not isinstance(args[0], _Dispatched):
        raise PrepareError(
            f"pipeline: {function} would write values of {origin!r}, which is on another stage, into a tensor; the "
            "model cannot be cut between them: choose other stages with strategies.pipeline.split"
        )


def _to_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
