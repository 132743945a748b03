"""Checkpoints that other tools can read: safetensors files, which hold no code, and plain JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.errors import CheckpointError
from accel.interfaces import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

VALUES_FILE = "values.json"
"""Holds the plain values and the names of the groups. Written last, so a folder without it is not whole."""

_MARK = "$"
"""Begins the one key of an object that stands for a number JSON lacks; real keys that begin so get a second one."""


class Safetensors(Checkpoint):
    """One `.safetensors` file for each group of tensors, and `values.json` for the rest."""

    def save(self, folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        """Write everything and wait until it is on disk; raises CheckpointError naming what cannot be written."""
        for group, named in tensors.items():
            _save_group(_group_file(folder, group), named)
        content = {"groups": list(tensors), "values": _encode(values, "values")}
        path = folder / VALUES_FILE
        try:
            path.write_text(json.dumps(content, indent=1, allow_nan=False), "utf-8")
            _flush(path)
            _flush(folder)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {error}") from error

    def load(self, folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Read what `save` wrote; raises CheckpointError naming the file that is missing or damaged."""
        path = folder / VALUES_FILE
        try:
            content = json.loads(path.read_text("utf-8"))
            groups, values = list(content["groups"]), _decode(content["values"])
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file; this folder holds no complete checkpoint") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged: {type(error).__name__}: {error}") from error
        return {group: _load_group(_group_file(folder, group)) for group in groups}, values


def _group_file(folder: Path, group: str) -> Path:
    if not group or Path(group).name != group:
        raise CheckpointError(f"{folder}: group {group!r} cannot be a file name")
    return folder / f"{group}.safetensors"


def _save_group(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(_separate(path, tensors), path)
        _flush(path)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        kinds = ", ".join(sorted({str(tensor.dtype) for tensor in tensors.values()}))
        raise CheckpointError(f"{path}: cannot be written: {type(error).__name__}: {error} (types: {kinds})") from error


def _separate(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each contiguous and in memory of its own: the format knows no sharing, as of tied weights."""
    from torch import Tensor

    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name} must be a tensor, got {type(tensor).__name__}")
        memory = tensor.untyped_storage().data_ptr()
        whole = tensor.detach().contiguous()
        separate[name] = whole.clone() if memory in seen and whole.untyped_storage().data_ptr() == memory else whole
        seen.add(memory)
    return separate


def _load_group(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, though {VALUES_FILE} names it") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    return tensors


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(value: Any, path: str) -> Any:
    """`value` as strict JSON; tuples become lists. Raises CheckpointError naming the path of what JSON cannot hold."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {f"{_MARK}float": str(value)}
    if isinstance(value, (list, tuple)):
        return [_encode(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise CheckpointError(f"{path}: keys must be text, got {wrong[0]!r}")
        return {_escape(key): _encode(item, f"{path}.{key}") for key, item in value.items()}
    raise CheckpointError(f"{path}: {type(value).__name__} cannot be saved as JSON; save tensors as tensors")


def _escape(key: str) -> str:
    return _MARK + key if key.startswith(_MARK) else key


def _decode(value: Any) -> Any:
    """What `_encode` was given."""
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {f"{_MARK}float"}:
        return float(value[f"{_MARK}float"])
    return {key[len(_MARK) :] if key.startswith(_MARK) else key: _decode(item) for key, item in value.items()}
