"""Tensors described in one line of YAML, as in `int64[2, 8] < 100`: the inputs on which a model is tried out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

_PATTERN = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<shape>[\d, ]*)\](\s*<\s*(?P<below>\d+))?")
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's dtype by name and its shape; integers lie from 0 to `below`, exclusive."""

    dtype: str
    shape: tuple[int, ...]
    below: int = 2


def parse_example(values: Mapping[str, Any], path: str = "example") -> dict[str, TensorSpec]:
    """The inputs that an option describes, by argument of `forward`. Raises ConfigError that begins with `path`.

    >>> parse_example({"tokens": "int64[2, 8] < 100"})
    {'tokens': TensorSpec(dtype='int64', shape=(2, 8), below=100)}
    """
    return {name: _parse(value, f"{path}.{name}") for name, value in values.items()}


def _parse(value: Any, path: str) -> TensorSpec:
    found = _PATTERN.fullmatch(value.strip()) if isinstance(value, str) else None
    sizes = [size.strip() for size in found["shape"].split(",") if size.strip()] if found else []
    if not found or found["dtype"] not in _DTYPES or not all(size.isdigit() and int(size) for size in sizes):
        raise ConfigError(
            f"{path}: expected a tensor as in 'float32[2, 3, 32, 32]' or 'int64[2, 8] < 100', of one of the types "
            f"{', '.join(_DTYPES)}; got {value!r}"
        )
    return TensorSpec(found["dtype"], tuple(map(int, sizes)), max(int(found["below"] or 2), 1))
