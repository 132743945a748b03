"""Any state dict survives the way through plain values; what cannot is refused by its path."""

import json
from collections import Counter

import pytest
import torch

from accel.errors import CheckpointError
from accel.runtime.pack import pack, unpack


def test_round_trip_through_json():
    value = {
        "a": [1, 2.5, None, True, "t"],
        "tuple": (1, (torch.arange(3), "x")),
        3: {"nested": torch.eye(2)},
        "counter": Counter({30: 2, 80: 1}),
        "dtype": torch.bfloat16,
        "$": "a key that looks like a tag",
    }
    tensors = {}
    packed = json.loads(json.dumps(pack(value, tensors)))
    result = unpack(packed, tensors)
    assert result.keys() == value.keys()
    assert result["tuple"][0] == 1
    assert torch.equal(result["tuple"][1][0], torch.arange(3))
    assert torch.equal(result[3]["nested"], torch.eye(2))
    assert type(result["counter"]) is Counter
    assert [result[key] for key in ("a", "counter", "dtype", "$")] == [
        value[key] for key in ("a", "counter", "dtype", "$")
    ]


def test_tensors_are_copies():
    original, tensors = torch.zeros(2), {}
    pack({"t": original}, tensors)
    original.fill_(1)
    assert tensors["t"].tolist() == [0, 0]


def test_an_object_is_refused_by_its_path():
    with pytest.raises(CheckpointError, match=r"registered\.0\.inner\.1: a builtins.object cannot be kept"):
        pack({"inner": [1, object()]}, {}, "registered.0")


def test_a_missing_tensor_is_named():
    packed = pack({"weight": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match="weight: the tensor is missing"):
        unpack(packed, {})


def test_paths_that_read_alike_are_kept_apart():
    tensors = {}
    packed = pack({"a.b": torch.ones(2), "a": {"b": torch.zeros(3)}}, tensors)
    result = unpack(packed, tensors)
    assert torch.equal(result["a.b"], torch.ones(2)) and torch.equal(result["a"]["b"], torch.zeros(3))


def test_a_sparse_tensor_is_refused_by_its_path():
    with pytest.raises(CheckpointError, match=r"graph: a tensor of layout torch.sparse_coo .* to_dense"):
        pack({"graph": torch.eye(2).to_sparse()}, {})
