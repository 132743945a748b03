"""`checkpoint: safetensors`: the library of that name reads what we lay out, and we read what it writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accel import registry
from accel.errors import CheckpointError
from accel.interfaces import Checkpoint, Entry, File, Place
from accel.storage import Geometry, Reader, Writer

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.fixture
def format() -> Checkpoint:
    plugin = registry.load("checkpoint", "safetensors")
    return plugin(plugin.Options())


def entry(name: str, tensor: Tensor) -> Entry:
    return Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def content(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def write(format: Checkpoint, folder: Path, tensors: Mapping[str, Tensor], largest: int = 1 << 40) -> list[File]:
    files = list(format.layout("model", [entry(n, t) for n, t in tensors.items()], largest))
    with Writer(folder) as writer:
        for file in files:
            writer.create(file.name, file.size, file.head)
            for place in file.places:
                writer.write(file.name, Geometry(place.offset, place.size), content(tensors[place.entry.name]))
    return files


def read(folder: Path, place: Place) -> bytes:
    buffer = bytearray(place.size)
    with Reader(folder) as reader:
        reader.read(place.file, Geometry(place.offset, place.size), memoryview(buffer))
    return bytes(buffer)


def samples() -> dict[str, Tensor]:
    torch.manual_seed(0)
    odd = {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), 'ü\n"/.': torch.randn(2)}
    return {str(dtype): (torch.randn(3, 5).abs() * 10).to(dtype) for dtype in DTYPES} | odd


def test_the_library_reads_what_we_lay_out(format: Checkpoint, tmp_path: Path) -> None:
    tensors = samples()
    write(format, tmp_path, tensors)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert content(found[name]) == content(tensor)


def test_we_read_what_the_library_writes(format: Checkpoint, tmp_path: Path) -> None:
    tensors = samples()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    places = format.places(tmp_path, "model")
    assert {name: place.entry for name, place in places.items()} == {n: entry(n, t) for n, t in tensors.items()}
    assert all(read(tmp_path, places[name]) == bytes(content(tensor)) for name, tensor in tensors.items())


def test_elements_are_aligned(format: Checkpoint) -> None:
    entries = [Entry("flag", "bool", (3,)), Entry("wide", "float64", (2,)), Entry("none", "float64", (0,))]
    entries += [Entry("step", "float32", ()), Entry("large", "float32", (64, 64)), Entry("odd", "float64", (3,))]
    [file] = format.layout("model", entries, 1 << 40)
    offsets = {place.entry.name: place.offset for place in file.places}
    assert offsets["none"] % 4096 == offsets["large"] % 4096 == offsets["wide"] % 16 == offsets["odd"] % 8 == 0
    assert offsets["step"] % 4 == 0
    assert list(offsets) == [entry.name for entry in entries]


def test_large_groups_are_cut_as_hugging_face_does(format: Checkpoint, tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.full((10,), float(i)) for i in range(5)}
    files = write(format, tmp_path, tensors, largest=80)
    assert [file.name for file in files] == [
        *(f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 200}
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)
    assert format.places(tmp_path, "model").keys() == tensors.keys()


def test_a_tensor_larger_than_a_file_has_one_alone(format: Checkpoint) -> None:
    entries = [Entry("a", "float32", (1,)), Entry("b", "float32", (100,)), Entry("c", "float32", (1,))]
    files = format.layout("model", entries, 10)
    assert [[place.entry.name for place in file.places] for file in files] == [["a"], ["b"], ["c"], []]


@pytest.mark.parametrize("group", ["", "a/b", "../model"])
def test_groups_are_file_names(format: Checkpoint, group: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be a file name"):
        format.layout(group, [], 100)


def test_dtypes_that_the_format_lacks(format: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="w: safetensors files hold no complex128"):
        format.layout("model", [Entry("w", "complex128", (1,))], 100)


def test_empty_folder(format: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        format.places(tmp_path, "model")


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_files_cut_short(format: Checkpoint, tmp_path: Path, keep: int) -> None:
    write(format, tmp_path, {"x": torch.randn(100)})
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        format.places(tmp_path, "model")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"x": 1}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
    ],
)
def test_headers_that_contradict_themselves(format: Checkpoint, tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        format.places(tmp_path, "model")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", r"index\.json: damaged"),
        ('{"weight_map": {"x": "../model.safetensors"}}', "is no file of this folder"),
        ('{"weight_map": {"x": "gone.safetensors"}}', r"gone\.safetensors: no such file"),
        ('{"weight_map": {"y": "part.safetensors"}}', r"part\.safetensors: lacks y"),
    ],
)
def test_damaged_index(format: Checkpoint, tmp_path: Path, index: str, message: str) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        format.places(tmp_path, "model")
