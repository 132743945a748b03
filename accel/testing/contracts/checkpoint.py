"""What a checkpoint format promises: files in which every tensor has its place, found again by reading them alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from ...errors import CheckpointError
from ...interfaces import Checkpoint, Entry, File, Place
from ...storage import Geometry, Reader, Writer
from .case import Case

GROUPS = {
    "model": [Entry(dtype, dtype, (3, 5)) for dtype in ("float64", "float32", "bfloat16", "int64", "uint8", "bool")],
    "optimizer": [
        Entry("scalar", "float32", ()),
        Entry("empty", "float32", (0, 3)),
        Entry("dotted.name/with.slash ü", "float16", (7,)),
    ],
    "nothing": [],
}
SMALL = 100
"""Bytes to a file that make several files of the tensors above."""


def gives_back_the_same_bytes(case: Case) -> None:
    """Tensors written at their places come back, by name, with dtype, shape and bytes; in one file or several."""
    for largest in (1 << 40, SMALL):
        assert case.run(1, _round_trip, case.make(), largest) == [[]]


def gives_every_byte_one_place(case: Case) -> None:
    """No two tensors overlap, none reaches out of its file or into its head, and a second call says the same."""
    assert case.run(1, _overlaps, case.make()) == [[]]


def refuses_a_folder_without_a_checkpoint(case: Case) -> None:
    """Reading an empty folder raises CheckpointError, which names it."""
    [(kind, message, folder)] = case.run(1, _read_nothing, case.make())
    assert kind == "CheckpointError", f"{kind}: {message}"
    assert folder in message, f"the message does not name the folder: {message}"


def refuses_a_file_cut_short(case: Case) -> None:
    """A group of which the largest file has lost its second half raises CheckpointError."""
    [kind] = case.run(1, _read_half, case.make())
    assert kind == "CheckpointError", f"got {kind}"


CONTRACTS = (
    gives_back_the_same_bytes,
    gives_every_byte_one_place,
    refuses_a_folder_without_a_checkpoint,
    refuses_a_file_cut_short,
)


def _write(folder: Path, files: Sequence[File]) -> None:
    """Each tensor is filled with bytes that tell it from the others."""
    with Writer(folder) as writer:
        for file in files:
            writer.create(file.name, file.size, file.head)
            for place in file.places:
                writer.write(
                    file.name, Geometry(place.offset, place.size), memoryview(_content(place.entry, place.size))
                )


def _content(entry: Entry, size: int) -> bytes:
    return (entry.name.encode() * (size + 1))[:size]


def _round_trip(format: Checkpoint, largest: int) -> list[str]:
    """What did not come back as it was written."""
    wrong = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        for group, entries in GROUPS.items():
            _write(folder, format.layout(group, entries, largest))
        for group, entries in GROUPS.items():
            places = format.places(folder, group)
            wrong += [f"{group}: {sorted(places)}"] if places.keys() != {entry.name for entry in entries} else []
            for entry in entries:
                wrong += _differs(folder, places.get(entry.name), entry)
    return wrong


def _differs(folder: Path, place: Place | None, entry: Entry) -> list[str]:
    if place is None or place.entry != entry:
        return [f"{entry} came back as {place}"]
    buffer = bytearray(place.size)
    with Reader(folder) as reader:
        reader.read(place.file, Geometry(place.offset, place.size), memoryview(buffer))
    return [] if buffer == _content(entry, place.size) else [f"{entry.name}: other bytes"]


def _overlaps(format: Checkpoint) -> list[str]:
    wrong = []
    for group, entries in GROUPS.items():
        files = format.layout(group, entries, SMALL)
        wrong += (
            [] if list(files) == list(format.layout(group, entries, SMALL)) else [f"{group}: differs when asked again"]
        )
        for file in files:
            end = len(file.head)
            for place in sorted(file.places, key=lambda place: (place.offset, place.size)):
                wrong += [f"{group}: {place.entry.name} overlaps"] if place.offset < end else []
                end = place.offset + place.size
            wrong += [f"{group}: {file.name} ends at {file.size}, its tensors at {end}"] if end > file.size else []
    return wrong


def _read_nothing(format: Checkpoint) -> tuple[str, str, str]:
    with TemporaryDirectory() as folder:
        try:
            format.places(Path(folder), "model")
        except CheckpointError as error:
            return type(error).__name__, str(error), folder
        return "nothing raised", "", folder


def _read_half(format: Checkpoint) -> str:
    with TemporaryDirectory() as folder:
        _write(Path(folder), format.layout("model", GROUPS["model"], 1 << 40))
        largest = max(Path(folder).iterdir(), key=lambda file: file.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
        try:
            format.places(Path(folder), "model")
        except CheckpointError as error:
            return type(error).__name__
        return "nothing raised"
