"""Running a model that has no memory: its parameters have made-up values, and memory while an operation reads them.

How a model is best divided is found out by running it on an example, and whether its parts give what the whole gives.
Neither depends on what the weights are, as long as no two are alike by design, so that what goes wrong shows. A value
is a stretch of a row of random numbers: all share its memory, and every process makes the same one without a word.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ...errors import PrepareError
from ..shards import held_part, like_part
from .filling import is_empty
from .operations import RESERVES, name_of, only_looks, span_of, tensors_in, written_to
from .parameters import replace_parameters

_PERIOD = 1_048_573
"""After so many numbers the row repeats; a prime, so that rows and columns of a matrix do not."""

_STEP = 7919
"""So far apart in the row begin the values of one parameter and the next."""

_ALIGNED = 16
"""They begin at multiples of this, so that a value can be viewed in another dtype."""

_hollow: dict[int, _Hollow] = {}
"""The parameters of models that are being run without memory, by their storage."""

_rows: dict[Any, _Row] = {}
"""What their values are taken from."""


@contextlib.contextmanager
def runnable(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, a model whose parameters have no memory runs, on numbers of no meaning; a strategy may divide it there.

    Parameters seem to be on the device. What is left of them is on the meta device again afterwards, whole or divided.
    """
    if not any(map(is_empty, model.parameters())):
        yield
        return
    replace_parameters(model.modules(), lambda parameter: _stand_in(parameter, device))
    try:
        with _Values():  # type: ignore[no-untyped-call]
            yield
    finally:
        replace_parameters(model.modules(), _emptied)
        _hollow.clear()
        _rows.clear()


def hollow_whole(tensor: Tensor) -> Tensor | None:
    """The whole parameter behind a tensor, part of it or divided, if it has no memory but can be run."""
    known = _hollow.get(_key(held_part(tensor)))
    return None if known is None else known.whole


def made_up(count: int, scale: float, middle: float, like: Tensor) -> Tensor:
    """So many numbers, evenly spread about `middle` with `scale` as their standard deviation: the same everywhere."""
    numbers = torch.rand(min(count, _PERIOD), generator=torch.Generator().manual_seed(0))
    row = ((numbers - 0.5) * (math.sqrt(12) * scale) + middle).to(like.device, like.dtype)
    return row.repeat(-(-count // _PERIOD))[:count] if count > _PERIOD else row


class _Values(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives operations that read a parameter its value."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back with operations on its parts
        hollow = [tensor for tensor in tensors_in((args, kwargs)) if _key(tensor) in _hollow]
        if not hollow:
            return function(*args, **kwargs)
        written = written_to(function, args, kwargs)
        if only_looks(function, written) or name_of(function) in RESERVES:
            with _reserved(hollow):
                return function(*args, **kwargs)
        if any(_key(tensor) in _hollow for tensor in written):
            raise PrepareError(
                f"prepare: the forward of a model without memory changes a parameter by {function}; make the model "
                "without empty_init"
            )
        args, kwargs = tree_map_only(Tensor, _value, (args, kwargs))
        return function(*args, **kwargs)


@contextlib.contextmanager
def _reserved(tensors: list[Tensor]) -> Iterator[None]:
    """Inside, tensors have memory of any content: torch looks whether a view lies within it."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    for storage, tensor in zip(storages, tensors, strict=True):
        whole = _hollow[_key(tensor)].whole
        storage.resize_(span_of(whole) * whole.itemsize)
    try:
        yield
    finally:
        for storage in storages:
            storage.resize_(0)


def _value(tensor: Tensor) -> Tensor:
    """A tensor with a parameter's made-up value, for one without memory."""
    known = _hollow.get(_key(tensor))
    if known is None:
        return tensor
    start = known.start * known.whole.itemsize // tensor.itemsize
    made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return made.set_(known.row.storage(known.whole), start + tensor.storage_offset(), tensor.shape, tensor.stride())


class _Row:
    """Numbers that parameters of one dtype and scale share: a value is a stretch of it, so that it costs nothing."""

    def __init__(self, scale: float, middle: float) -> None:
        self.scale, self.middle, self.length = scale, middle, 0
        self._numbers: Tensor | None = None

    def reserve(self, start: int, whole: Tensor) -> None:
        """Make sure that the row is long enough for a parameter whose value starts there."""
        self.length = max(self.length, start + span_of(whole))
        self._numbers = None

    def storage(self, like: Tensor) -> torch.UntypedStorage:
        """The row in memory."""
        if self._numbers is None:
            self._numbers = made_up(self.length, self.scale, self.middle, like)
        return self._numbers.untyped_storage()


@dataclass(frozen=True, eq=False)
class _Hollow:
    """A whole parameter without memory, and where in which row its value starts."""

    whole: Tensor
    row: _Row
    start: int


def _row_of(whole: Tensor) -> _Row:
    """The row for a parameter: of a matrix, numbers that keep products about as large as what goes in; else near 1."""
    scale, middle = 0.25, 1.0
    if whole.dim() > 1:
        inputs = max(whole.numel() // max(whole.shape[0], 1), 1)
        scale, middle = 2.0 ** -round(math.log(inputs, 4)), 0.0
    kind = whole.dtype, whole.device, scale, middle
    return _rows.setdefault(kind, _Row(scale, middle))


def _stand_in(parameter: nn.Parameter, device: torch.device) -> nn.Parameter | None:
    """A parameter on the device, of no memory, in the place of one on the meta device."""
    if not is_empty(parameter):
        return None
    whole = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device=device)
    whole.untyped_storage().resize_(0)
    if whole.numel():
        row, start = _row_of(whole), len(_hollow) * _STEP % _PERIOD // _ALIGNED * _ALIGNED
        row.reserve(start, whole)
        _hollow[_key(whole)] = _Hollow(whole, row, start)
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


def _emptied(parameter: nn.Parameter) -> nn.Parameter | None:
    """A parameter on the meta device, whole or divided, in the place of one that could be run."""
    if hollow_whole(parameter) is None:
        return None
    if isinstance(parameter, DTensor):
        part = torch.empty(held_part(parameter).shape, dtype=parameter.dtype, device="meta")
    else:
        part = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
    return nn.Parameter(like_part(part, parameter), requires_grad=parameter.requires_grad)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
