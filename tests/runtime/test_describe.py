"""What `describe` says, against what plain torch counts."""

import pytest
import torch
from torch import nn

from accel import Accelerator
from accel.errors import PrepareError
from accel.interfaces import Axis
from accel.testing import run


def described(strategies, precision):
    accelerator = Accelerator(strategies=strategies, mixed_precision=precision)
    model = accelerator.prepare(nn.Linear(6, 4))
    return accelerator.describe(model)


@pytest.mark.parametrize("strategies", ["ddp", {"zero3": {"reduce_dtype": "bfloat16"}}])
def test_a_description_counts_what_each_process_holds(strategies):
    found = run(2, described, strategies, "bf16")
    shared = isinstance(strategies, dict)
    for rank in found:
        assert (rank.elements, rank.held) == (6 * 4 + 4, 14 if shared else 28)
        assert (rank.contract.parameters, rank.contract.master) == (("float32",), ("float32",))
        assert (rank.contract.compute, rank.contract.reduce) == ("bfloat16", ("bfloat16" if shared else "float32",))
        assert rank.mesh == {Axis.DATA: 2}
        assert str(rank).startswith(f"Linear: 28 parameters, {rank.held} of them on this process\n  mesh: data 2\n")


def test_only_prepared_models_are_described():
    with pytest.raises(PrepareError, match="describe: this Linear was not prepared"):
        Accelerator().describe(nn.Linear(2, 2))


def test_numbers_of_any_kind_are_named():
    accelerator = Accelerator()
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2).to(torch.bfloat16)})
    accelerator.prepare(model)
    assert "parameters float32, bfloat16, compute float32" in str(accelerator.describe(model))
