"""Containers keep their types while tensors in them change."""

from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from accel.runtime.nested import leaves, map_tensors, tensors

Pair = namedtuple("Pair", "left right")


@dataclass(frozen=True)
class Batch:
    x: Any
    name: str = "b"


def test_every_container_keeps_its_type():
    one = torch.ones(1)
    default = defaultdict(list, a=one)
    value = {
        "l": [one, "s"],
        "t": (one, 2),
        "p": Pair(one, None),
        "o": OrderedDict(k=one),
        "d": default,
        "b": Batch([one]),
    }
    result = map_tensors(lambda tensor: tensor * 2, value)
    assert [type(v) for v in result.values()] == [list, tuple, Pair, OrderedDict, defaultdict, Batch]
    assert result["d"].default_factory is list
    assert result["b"].name == "b"
    assert result["l"][1] == "s"
    assert all(tensor.item() == 2 for _, tensor in tensors(result))
    assert all(tensor.item() == 1 for _, tensor in tensors(value))


def test_what_holds_no_changed_tensor_is_returned_itself():
    value = [{"a": 1}, ("x", Batch(None)), MappingProxyType({"k": {1, 2}})]
    assert map_tensors(lambda tensor: tensor + 1, value) is value


def test_paths_name_each_leaf():
    value = {"a": [torch.ones(1), Batch(3)]}
    assert [path for path, _ in leaves(value)] == ["['a'][0]", "['a'][1].x", "['a'][1].name"]


class Output(OrderedDict):
    """Like the outputs of some model libraries: items can be set one by one, but not updated."""

    def update(self, *unused: Any) -> None:
        raise TypeError("Output.update is not supported")


def test_a_mapping_that_refuses_update_is_rebuilt():
    output = OrderedDict.__new__(Output)
    output["loss"] = torch.ones(1)
    result = map_tensors(lambda tensor: tensor * 3, output)
    assert type(result) is Output
    assert result["loss"].item() == 3
