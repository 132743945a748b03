"""Tensors whose values another stage has.

They have a shape, a dtype and a device, take no memory, and what is computed from them is absent too and costs
nothing. Whoever asks for their values is refused: the alternative, zeros of the right shape, would be a wrong number
that nobody notices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from accel.errors import PrepareError
from accel.runtime.deferred.operations import written_to
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

_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}


class _Dispatched:
    """Computes shapes where torch would compute values."""

    _device: torch.device
    origin: str
    """The name of the module or parameter, on another stage, that the values are missing of."""

    hint = (
        "If it is needed for some inputs only, let strategies.pipeline.example describe such; else choose other stages "
        "with strategies.pipeline.split"
    )
    """What to do about a refusal."""

    @property
    def missing(self) -> str:
        """What is missing, for messages."""
        return f"{self.origin!r}, which is on another stage"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        """The device on which the values would be."""
        return self._device

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise PrepareError(
            f"{self.origin}: is on another pipeline stage, and cannot be copied or pickled here; for the weights of "
            "the whole model, all ranks call accelerator.get_state_dict(model)"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.origin})"


class Absent(_Dispatched, Tensor):  # type: ignore[misc,override]
    """A value of the forward pass that this stage has not."""

    @classmethod
    def made(cls, meta: Tensor, device: torch.device, origin: str) -> Self:
        """The absent tensor of this kind, of the shape and dtype of another.

        For torch it is on its device, not on `meta`: what a model makes there (`mask.type_as(hidden)`) has values.
        """
        shape, strides, offset = meta.shape, meta.stride(), meta.storage_offset()
        made: Self = Tensor._make_wrapper_subclass(cls, shape, strides, offset, dtype=meta.dtype, device=device)
        made._device, made.origin = device, origin
        return made


class AbsentWeight(Absent):
    """What is computed from parameters alone: on `meta`, as they are. Whoever saves weights goes by that."""

    @classmethod
    def made(cls, meta: Tensor, device: torch.device, origin: str) -> Self:
        """The absent tensor of this kind, of the shape and dtype of another."""
        made: Self = Tensor._make_subclass(cls, meta)
        made._device, made.origin = device, origin
        return made


class AbsentParameter(_Dispatched, Elsewhere):  # type: ignore[misc,override]
    """A parameter that other stages hold."""


def absent(shape: Any, dtype: torch.dtype, device: torch.device, origin: str) -> Absent:
    """An absent tensor; `origin` names whose result it is."""
    return Absent.made(torch.empty(shape, dtype=dtype, device="meta"), device, origin)


def absent_parameter(parameter: Tensor, name: str) -> AbsentParameter:
    """What stands in for a parameter that other stages hold."""
    made = AbsentParameter(parameter, parameter.requires_grad)
    made.origin = name
    return made


def compute(function: Any, args: Any, kwargs: dict[str, Any], kind: type[Absent] = Absent, fresh: bool = True) -> Any:
    """What an operation on absent tensors makes: absent tensors of this kind, or, if `fresh`, what needs no values."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _Dispatched)]
    device, origin = given[0]._device, given[0].origin
    if kind is Absent and all(isinstance(leaf, (AbsentParameter, AbsentWeight)) for leaf in given):
        kind = AbsentWeight
    args = _counted(function, args)
    if fresh and function.overloadpacket in FRESH:
        like = torch.empty((), dtype=args[0].dtype, device=device).expand(args[0].shape)
        return function(like, *args[1:], **kwargs)
    _refuse_writes(function, args, kwargs, given[0])
    if kwargs.get("device") is not None:
        device, kwargs = torch.device(kwargs["device"]), {**kwargs, "device": torch.device("meta")}
    leaves, nesting = tree_flatten((args, kwargs))
    try:
        result = _shapes(function, nesting, tuple((type(leaf), _Shape.of(leaf)) for leaf in leaves))
    except (RuntimeError, NotImplementedError) as error:
        first = given[0]
        raise PrepareError(f"pipeline: {function} needs values of {first.missing}: {error}. {first.hint}") from error
    if function._schema.is_mutable:
        return args[0] if function._schema.returns else None  # those on lists return nothing
    return tree_map_only(_Shape, lambda shape: kind.made(shape.meta(), device, origin), result)


def _counted(function: Any, args: Any) -> Any:
    """The same arguments with places instead of the masks that are here, which say how many elements are taken."""
    if function.overloadpacket not in _INDEXING:
        return args
    places: list[Any] = []
    for index in args[1]:
        mask = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
        places += index.nonzero().unbind(1) if mask and not isinstance(index, _Dispatched) else [index]
    return args[0], places, *args[2:]


def _refuse_writes(function: Any, args: Any, kwargs: Any, lacking: _Dispatched) -> None:
    """Refuse to change a tensor that is here by values that are not."""
    if any(not isinstance(tensor, _Dispatched) for tensor in written_to(function, args, kwargs)):
        raise PrepareError(
            f"pipeline: {function} would write values of {lacking.missing} into a tensor that is here. {lacking.hint}"
        )


@dataclass(frozen=True)
class _Shape:
    """What is known of a tensor without its values."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Any) -> Any:
        """That of a tensor; anything else is returned as it is."""
        return cls(value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value

    def meta(self) -> Tensor:
        """A tensor like this, without memory."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


@functools.lru_cache(maxsize=1000)
def _shapes(function: Any, nesting: TreeSpec, leaves: tuple[tuple[type, Any], ...]) -> Any:
    """What an operation returns, as shapes; remembered, since torch takes longer to find it than to compute values.

    Leaves come with their types, as 1 and True are equal. Where torch knows no shapes without values, zeros tell.
    """

    def on(tensor: Callable[[_Shape], Tensor]) -> Any:
        args, kwargs = tree_unflatten([tensor(e) if isinstance(e, _Shape) else e for _, e in leaves], nesting)
        return tree_map_only(Tensor, _Shape.of, function(*args, **kwargs))

    try:
        return on(_Shape.meta)
    except NotImplementedError:
        if {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}.intersection(function.tags):
            raise
        return on(lambda shape: torch.zeros_like(shape.meta(), device="cpu"))
