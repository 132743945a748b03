"""What refers to a parameter that a strategy has replaced: a name kept in the loop, a list, a view made in `__init__`.

Such a tensor has no gradient and no values, or those of long ago: a penalty over it would be zero, clipping it would
clip nothing, and nobody would notice. Any use of it is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from ..errors import PrepareError
from .nested import tensors

_HARMLESS = {
    torch.is_floating_point,
    torch.is_complex,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.untyped_storage,
    *(
        getattr(Tensor, name).__get__
        for name in ("requires_grad", "is_leaf", "retains_grad", "dtype", "device", "layout", "is_meta", "is_sparse")
    ),
}
"""What an optimizer asks of the parameters that it is made with, before `prepare` gives it those that train."""


class _Refuses:
    _refusal: str

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        raise PrepareError(next(t._refusal for _, t in tensors([args, kwargs]) if isinstance(t, cls)))


class ReplacedParameter(_Refuses, nn.Parameter):
    """A parameter that is not the model's any more."""


class ReplacedView(_Refuses, Tensor):
    """A tensor in the memory of such a parameter."""


@dataclass(frozen=True)
class View:
    """A tensor in the memory of `parameter` that a module keeps in an attribute, called `name`."""

    name: str
    parameter: nn.Parameter
    tensor: Tensor


def views_of_parameters(modules: Sequence[nn.Module]) -> list[View]:
    """The views of parameters that modules keep in attributes of their own, also in lists and dicts."""
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    memory = {_memory(p): p for p in parameters if not is_lazy(p) and p.layout is torch.strided}
    return [
        View(name, memory[_memory(tensor)], tensor)
        for name, tensor in _attributes(modules)
        if type(tensor) is Tensor and tensor.layout is torch.strided and _memory(tensor) in memory
    ]


def _attributes(modules: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for module in modules:
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                for path, tensor in tensors(value):
                    yield f"{type(module).__name__}.{key}{path}", tensor


def _memory(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def refuse_parameter(parameter: nn.Parameter, name: str) -> None:
    """Refuse any use, from now on, of what was the parameter of this name."""
    if type(parameter) is nn.Parameter:
        advice = (
            f"parameter {name!r} was replaced by prepare(), and this reference to it was kept from before, in the loop "
            f"or in an attribute of the model; ask the model for it anew, as model.get_parameter({name!r})"
        )
        _refuse(parameter, ReplacedParameter, advice)


def refuse_view(view: View) -> None:
    """Refuse any use, from now on, of a view of what was a parameter."""
    view.tensor.data = view.tensor.data.new_empty(0)  # else the whole parameter stays in memory
    advice = (
        f"{view.name} was made from a parameter before prepare(), which has replaced the parameter; make it in "
        "forward, each time"
    )
    _refuse(view.tensor, ReplacedView, advice)


def _refuse(tensor: Any, kind: type[Tensor], refusal: str) -> None:
    tensor._refusal = refusal
    tensor.__class__ = kind
