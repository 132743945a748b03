"""What a checkpoint format promises: the same bits back, or an error."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...interfaces import Checkpoint
from .case import Case

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)

VALUES: dict[str, Any] = {
    "numbers": [0, -1, 2**53, 0.1, 1e-300],
    "text": "ü \n \"'",
    "nothing": None,
    "truth": [True, False],
    "nested": {"empty": {}, "list": [[], [{}]]},
}


def gives_back_the_same_bits(case: Case) -> None:
    """Tensors come back with their groups, names, shapes, dtypes and bits; plain values come back equal."""
    [wrong] = case.run(1, _round_trip, case.make())
    assert wrong == []


def refuses_a_folder_without_a_checkpoint(case: Case) -> None:
    """Loading from an empty folder raises CheckpointError, which names it."""
    [(kind, message, folder)] = case.run(1, _load_nothing, case.make())
    assert kind == "CheckpointError", f"{kind}: {message}"
    assert folder in message, f"the message does not name the folder: {message}"


def refuses_a_file_cut_short(case: Case) -> None:
    """A checkpoint of which the largest file has lost its second half raises CheckpointError."""
    [kind] = case.run(1, _load_half, case.make())
    assert kind == "CheckpointError", f"got {kind}"


CONTRACTS = (gives_back_the_same_bits, refuses_a_folder_without_a_checkpoint, refuses_a_file_cut_short)


def _tensors() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(0)
    plain = {str(dtype): (torch.randn(3, 5) * 100).to(dtype) for dtype in DTYPES}
    shared = torch.randn(4)
    odd = {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "transposed": torch.randn(3, 5).t(),
        "slice": torch.randn(10)[2:5],
        "not a number": torch.tensor([float("nan"), float("inf"), -0.0]),
        "shared": shared,
        "shared again": shared,
        "dotted.name/with.slash": torch.ones(1),
    }
    return {"model": plain, "optimizer": odd, "no tensors": {}}


def _round_trip(checkpoint: Checkpoint) -> list[str]:
    """What did not come back as it was saved."""
    saved = _tensors()
    with TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), saved, VALUES)
        tensors, values = checkpoint.load(Path(folder))
    wrong = [f"values: {values} instead of {VALUES}"] if values != VALUES else []
    for group, members in saved.items():
        found = tensors.get(group, {})
        wrong += [f"{group}: {sorted(found)}"] if found.keys() != members.keys() else []
        wrong += [f"{group}.{name}" for name in found.keys() & members.keys() if not _same(found[name], members[name])]
    return wrong


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _load_nothing(checkpoint: Checkpoint) -> tuple[str, str, str]:
    with TemporaryDirectory() as folder:
        try:
            checkpoint.load(Path(folder))
        except CheckpointError as error:
            return type(error).__name__, str(error), folder
        return "nothing raised", "", folder


def _load_half(checkpoint: Checkpoint) -> str:
    with TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), _tensors(), VALUES)
        largest = max(
            (file for file in Path(folder).rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
        )
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
        try:
            checkpoint.load(Path(folder))
        except CheckpointError as error:
            return type(error).__name__
        return "nothing raised"
