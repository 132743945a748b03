"""Which dim of which input of a model is its sequence."""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import PrepareError
from accel.runtime.divided.tensor import Divided, Division, divide, whole_of
from accel.runtime.example import Inputs, tried_out
from accel.runtime.nested import map_tensors

from .peers import Watching

SETTING = "strategies.context.dims"


class Arguments:
    """The arguments of a model's forward by name; those of `*args` by their number."""

    def __init__(self, model: nn.Module) -> None:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]

    def tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those that are tensors."""
        named = {self._name(place): value for place, value in enumerate(args)} | dict(kwargs)
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def replace(self, args: tuple[Any, ...], kwargs: dict[str, Any], new: Mapping[str, Any]) -> Inputs:
        """The same call with other values for some."""
        changed = tuple(new.get(self._name(place), value) for place, value in enumerate(args))
        return changed, {name: new.get(name, value) for name, value in kwargs.items()}

    def _name(self, place: int) -> str:
        return self.names[place] if place < len(self.names) else str(place)


def sequence_dims(model: nn.Module, inputs: Inputs, given: Mapping[str, int]) -> dict[str, int]:
    """The dim of positions of each input that has one, by argument; `given` goes before what is found out.

    A dim is the sequence if attention makes its positions meet. Where no attention tells, it is dim 1 of integers
    [B, T] and of vectors [B, T, C]. Raises PrepareError if there is none.
    """
    arguments = Arguments(model)
    tensors = arguments.tensors(*inputs)
    if given:
        _check(given, tensors, model)
        return dict(given)
    usual = {name: 1 for name, t in tensors.items() if t.dim() == (3 if t.is_floating_point() else 2)}
    other = dict.fromkeys(usual, 0)
    for dims in (usual, other):
        found = _met(model, inputs, arguments, dims)
        if found:
            return {name: dim for name, dim in dims.items() if name in found}
    if not usual:
        raise PrepareError(
            f"prepare: found no input of this {type(model).__name__} with a dim of positions, to divide it among the "
            f"processes of `context`: {_shapes(tensors)}; name it, as in `{SETTING}: {{input_ids: 1}}`"
        )
    return usual


def lengthened(model: nn.Module, inputs: Inputs, dims: Mapping[str, int], size: int) -> Inputs:
    """The same inputs with each sequence repeated until its length divides by `size`.

    What has as many entries along the same dim, such as a mask, is repeated with it. Raises PrepareError if the model
    does not run on that.
    """
    arguments = Arguments(model)
    given = arguments.tensors(*inputs)
    lengths = {(dim, given[name].shape[dim]) for name, dim in dims.items()}
    repeats = {(dim, length): size // math.gcd(length, size) for dim, length in lengths}
    longer = {}
    for name, tensor in given.items():
        for dim, length in enumerate(tensor.shape):
            tensor = torch.cat([tensor] * repeats.get((dim, length), 1), dim)
        longer[name] = tensor
    result = arguments.replace(*inputs, longer)
    try:
        with tried_out(model), torch.no_grad():
            model.eval()(*result[0], **result[1])
    except Exception as error:
        raise PrepareError(
            f"prepare: context tries {type(model).__name__} out on sequences that divide by {size}, but it does not "
            f"run on {_shapes(longer)} ({type(error).__name__}: {str(error).partition(chr(10))[0][:160]}); say others, "
            "as in `strategies.context.example: {tokens: 'int64[2, 64] < 100'}`"
        ) from error
    return result


def _met(model: nn.Module, inputs: Inputs, arguments: Arguments, dims: Mapping[str, int]) -> set[str]:
    """The inputs of which these dims are positions that attention makes meet."""
    peers = Watching(size=1)
    tensors = arguments.tensors(*inputs)
    divided = {
        name: divide(tensors[name].clone(), Division(peers, dim, sources=frozenset({name})))
        for name, dim in dims.items()
    }
    args, kwargs = arguments.replace(*inputs, divided)
    with tried_out(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.eval()
        with contextlib.suppress(RuntimeError):  # the check at the end of prepare says so
            map_tensors(whole_of, model(*args, **kwargs), Divided)
    return peers.met


def _check(given: Mapping[str, int], tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    for name, dim in given.items():
        if name not in tensors or dim >= tensors[name].dim():
            raise PrepareError(
                f"{SETTING}.{name}: {dim} is no dim of an input on which {type(model).__name__} was tried out: "
                f"{_shapes(tensors)}; strategies.context.example says other inputs"
            )


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(_shape(*item) for item in tensors.items()) or "no tensors"


def _shape(name: str, tensor: Tensor) -> str:
    return f"{name} {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
