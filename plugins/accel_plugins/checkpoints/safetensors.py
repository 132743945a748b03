"""Checkpoints that other tools can read: safetensors files, named and indexed as the Hugging Face ecosystem does.

The format (https://huggingface.co/docs/safetensors): the length of a JSON header in 8 bytes, little-endian, the
header, which gives dtype, shape and bytes of each tensor, then the tensors in row-major order without gaps. It knows
no sharing, so tied weights are written under each of their names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accel.errors import CheckpointError
from accel.interfaces import PAGE, Checkpoint, Entry, File, Place

DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "float8_e8m0fnu": ("F8_E8M0", 1),
    "complex64": ("C64", 8),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
"""The format's name, and the bytes of an element, for each dtype of torch that it holds."""

NAMES = {code: name for name, (code, _) in DTYPES.items()}
LARGEST_HEADER = 100_000_000
"""Readers of the format refuse longer ones."""


class Safetensors(Checkpoint):
    """`GROUP.safetensors`; if large, `GROUP-00001-of-0000N.safetensors` with `GROUP.safetensors.index.json`."""

    def layout(self, group: str, entries: Sequence[Entry], max_shard_size: int) -> Sequence[File]:
        if not group or Path(group).name != group:
            raise CheckpointError(f"group {group!r} cannot be a file name")
        shards = _shards(entries, max_shard_size)
        if len(shards) == 1:
            return [_file(f"{group}.safetensors", shards[0])]
        total = len(shards)
        files = [_file(f"{group}-{i:05}-of-{total:05}.safetensors", shard) for i, shard in enumerate(shards, 1)]
        return [*files, _index(group, files)]

    def places(self, folder: Path, group: str) -> Mapping[str, Place]:
        single, index = folder / f"{group}.safetensors", folder / f"{group}.safetensors.index.json"
        if single.exists() or not index.exists():
            return _read(single)
        weight_map = _weight_map(index)
        found: dict[str, Place] = {}
        for name in sorted(set(weight_map.values())):
            found |= _read(folder / name)
        if missing := sorted(
            name for name, file in weight_map.items() if name not in found or found[name].file != file
        ):
            raise CheckpointError(
                f"{folder / weight_map[missing[0]]}: lacks {missing[0]}, though {index.name} names it"
            )
        return found


def _size(entry: Entry) -> int:
    if entry.dtype not in DTYPES:
        raise CheckpointError(f"{entry.name}: safetensors files hold no {entry.dtype}; they hold {', '.join(DTYPES)}")
    return math.prod(entry.shape) * DTYPES[entry.dtype][1]


def _shards(entries: Sequence[Entry], largest: int) -> list[list[Entry]]:
    """Consecutive entries, as many to a file as fit; one file if there are none."""
    shards: list[list[Entry]] = [[]]
    room = largest
    for entry in entries:
        size = _size(entry)
        if shards[-1] and size > room:
            shards.append([])
            room = largest
        shards[-1].append(entry)
        room -= size
    return shards


def _file(name: str, entries: Sequence[Entry]) -> File:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = _starts(entries)
    for entry in entries:
        start, code = starts[entry.name], DTYPES[entry.dtype][0]
        header[entry.name] = {"dtype": code, "shape": list(entry.shape), "data_offsets": [start, start + _size(entry)]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    head = len(text).to_bytes(8, "little") + text
    places = tuple(Place(entry, name, len(head) + starts[entry.name], _size(entry)) for entry in entries)
    return File(name, head, len(head) + end, places)


def _starts(entries: Sequence[Entry]) -> tuple[dict[str, int], int]:
    """Where each tensor begins, and where the last one ends: those of whole pages first, then the roundest of others.

    So each begins where its size allows it, its bytes are aligned to its elements, and a small one shifts no large one.
    """
    starts, end = {}, 0
    for entry in sorted(entries, key=lambda entry: -math.gcd(_size(entry), PAGE)):
        starts[entry.name] = end
        end += _size(entry)
    return starts, end


def _index(group: str, files: Sequence[File]) -> File:
    weight_map = {place.entry.name: file.name for file in files for place in file.places}
    content = {"metadata": {"total_size": sum(p.size for f in files for p in f.places)}, "weight_map": weight_map}
    head = (json.dumps(content, indent=1) + "\n").encode()
    return File(f"{group}.safetensors.index.json", head, len(head))


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = dict(json.loads(path.read_bytes())["weight_map"])
        if outside := [file for file in weight_map.values() if Path(file).name != file]:
            raise ValueError(f"{outside[0]!r} is no file of this folder")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    return weight_map


def _read(path: Path) -> dict[str, Place]:
    """The tensors that a file's header names, checked against the file's length."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            places = {name: _place(path.name, name, facts, 8 + length) for name, facts in header.items()}
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    end = max((place.offset + place.size for place in places.values()), default=8 + length)
    if end != size:
        raise CheckpointError(f"{path}: damaged: holds {size} bytes, its header speaks of {end}")
    return places


def _place(file: str, name: str, facts: Mapping[str, Any], data: int) -> Place:
    entry = Entry(name, NAMES[facts["dtype"]], tuple(map(int, facts["shape"])))
    start, end = facts["data_offsets"]
    if not 0 <= start <= end or end - start != _size(entry):
        raise ValueError(f"{name}: {end - start} bytes for {entry.dtype} of shape {entry.shape}")
    return Place(entry, file, data + start, end - start)
