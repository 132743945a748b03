"""Moving batches: every tensor arrives, everything else is what it was. The meta device stands in for hardware."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

from accel.runtime.data.transfer import moved, to_device
from accel.runtime.loader import PreparedLoader

META = torch.device("meta")


class Pair(NamedTuple):
    image: torch.Tensor
    label: Any


@dataclass(frozen=True)
class Record:
    image: torch.Tensor
    name: str


class Encoding(UserDict[str, Any]):
    """A mapping with a `to` of its own, as tokenizers return."""

    def to(self, device: torch.device) -> Encoding:
        raise AssertionError("its items are moved one by one")


def ones() -> torch.Tensor:
    return torch.ones(2)


@pytest.mark.parametrize(
    ("batch", "tensors"),
    [
        (ones(), lambda b: [b]),
        ([ones(), (ones(), "text")], lambda b: [b[0], b[1][0]]),
        (Pair(ones(), {"deep": ones()}), lambda b: [b.image, b.label["deep"]]),
        (Record(ones(), "cat"), lambda b: [b.image]),
        (defaultdict(list, x=ones()), lambda b: [b["x"]]),
        (OrderedDict(x=ones()), lambda b: [b["x"]]),
        (Encoding(x=ones()), lambda b: [b["x"]]),
        (MappingProxyType({"x": ones()}), lambda b: [b["x"]]),
    ],
)
def test_tensors_arrive_and_containers_keep_their_types(batch: Any, tensors: Any) -> None:
    arrived = to_device(batch, META)
    assert type(arrived) is type(batch)
    assert all(tensor.device == META for tensor in tensors(arrived))
    assert all(tensor.device.type == "cpu" for tensor in tensors(batch))


def test_an_object_with_its_own_to_is_moved_by_it() -> None:
    packed = to_device(pack_sequence([ones(), torch.ones(1)]), META)
    assert packed.data.device == META and packed.batch_sizes.device.type == "cpu"


def test_what_is_no_tensor_is_the_same_object() -> None:
    for leaf in ("text", {1, 2}, 3, None, object(), torch.float32, int):
        assert to_device([leaf], META)[0] is leaf


def test_nothing_is_copied_for_a_cpu() -> None:
    batches = [(None, [ones()])]
    assert next(moved(batches, torch.device("cpu")))[1] is batches[0][1]  # type: ignore[arg-type]


def test_batches_that_are_no_tensors() -> None:
    loader = DataLoader(["a", "bb", "ccc"], 2, collate_fn=list)
    assert list(PreparedLoader(loader, device=META)) == [["a", "bb"], ["ccc"]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_cuda_batches_are_right_although_they_are_copied_ahead(workers: int) -> None:
    samples = [{"x": torch.full((1 << 16,), float(i)), "name": str(i)} for i in range(64)]
    loader = PreparedLoader(DataLoader(samples, 4, num_workers=workers), device=torch.device("cuda", 0))
    found = []
    for batch in loader:
        noise = torch.rand(4, 1 << 16, device="cuda")  # makes use of memory that the copies must not share
        found.append((batch["x"] + noise - noise).mean(dim=1).round())
        assert batch["x"].is_cuda and batch["name"][0].isdigit()
    assert torch.cat(found).tolist() == [float(i) for i in range(64)]
