"""Any state dict as tensors by name and values that JSON can hold, and back.

Formats on disk keep tensors and plain values apart; state dicts nest them freely, with tuples, counters and keys
that are not text. What is neither a tensor nor plain is refused by its path: no pickle is written or read.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .shards import whole_tensor

_TAG = "$"


def pack(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """The plain form of `value`; its tensors go to `tensors`, whole and on the CPU, under their paths.

    All ranks call it together, since sharded tensors are gathered. Raises CheckpointError for what has no plain form.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {_TAG: "float", "name": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            raise CheckpointError(f"{path}: a tensor of layout {value.layout} cannot be kept; keep to_dense() of it")
        while path in tensors:  # of {"a.b": ..., "a": {"b": ...}}, too, each has a name of its own
            path += "_"
        tensors[path] = whole_tensor(value).detach().to("cpu", copy=True).contiguous()
        return {_TAG: "tensor", "name": path}
    if isinstance(value, torch.dtype):
        return {_TAG: "dtype", "name": str(value).removeprefix("torch.")}
    if isinstance(value, list):
        return [pack(item, tensors, _join(path, index)) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {_TAG: "tuple", "items": pack(list(value), tensors, path)}
    if type(value) in (dict, OrderedDict, defaultdict, Counter):
        return _pack_mapping(value, tensors, path)
    raise CheckpointError(
        f"{path}: a {type(value).__module__}.{type(value).__qualname__} cannot be kept in a checkpoint; "
        "state_dict() must be made of tensors, numbers, text, lists, tuples and dicts"
    )


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tag = value.get(_TAG)
    if tag is None:
        return {key: unpack(item, tensors) for key, item in value.items()}
    if tag == "tensor":
        if value["name"] not in tensors:
            raise CheckpointError(f"{value['name']}: the tensor is missing from the checkpoint")
        return tensors[value["name"]]
    if tag == "float":
        return float(value["name"])
    if tag == "dtype":
        return getattr(torch, value["name"])
    if tag == "tuple":
        return tuple(unpack(value["items"], tensors))
    items = {unpack(key, tensors): unpack(item, tensors) for key, item in value["items"]}
    return Counter(items) if tag == "counter" else items


def _pack_mapping(value: Mapping[Any, Any], tensors: dict[str, Tensor], path: str) -> Any:
    if type(value) is not Counter and all(isinstance(key, str) for key in value) and _TAG not in value:
        return {key: pack(item, tensors, _join(path, key)) for key, item in value.items()}
    items = [[pack(key, tensors, path), pack(item, tensors, _join(path, key))] for key, item in value.items()]
    return {_TAG: "counter" if type(value) is Counter else "mapping", "items": items}


def _join(path: str, step: Any) -> str:
    return f"{path}.{step}" if path else str(step)
