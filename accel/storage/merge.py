"""Weights in one file, from however many: bytes are copied, a piece at a time, so memory stays small."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError
from ..interfaces import Checkpoint, Place
from .commit import aside
from .disk import CHUNK, Geometry, Reader, Writer
from .files import flush_folder, naming

ONE_FILE = 1 << 62
"""No limit to the bytes of a file."""


def merge(folder: Path, target: Path, format: Checkpoint) -> int:
    """Write the weights that a folder holds into one new file; returns the bytes of its tensors.

    Raises CheckpointError if the folder holds none, the file exists, or it cannot be written, and then leaves no file.
    """
    places = format.places(folder, "model")
    if target.exists():
        raise CheckpointError(f"{target}: exists; name a new file, or delete it")
    [file] = format.layout("model", [place.entry for place in places.values()], ONE_FILE)
    made = aside(target)
    try:
        with naming(made, "written"):
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(parents=True)
            with Writer(made) as writer, Reader(folder) as reader:
                writer.create(file.name, file.size, file.head)
                for place in file.places:
                    _copy(reader, places[place.entry.name], writer, place)
                writer.flush()
            (made / file.name).rename(target)
            flush_folder(target.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return sum(place.size for place in file.places)


def _copy(reader: Reader, source: Place, writer: Writer, target: Place) -> None:
    buffer = memoryview(bytearray(min(CHUNK, source.size)))
    for done, size in _pieces(source.size):
        reader.read(source.file, Geometry(source.offset + done, size), buffer[:size])
        writer.write(target.file, Geometry(target.offset + done, size), buffer[:size])


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(CHUNK, size - start)) for start in range(0, size, CHUNK))
