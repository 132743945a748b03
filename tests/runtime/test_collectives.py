"""Collective calls over nested structures, on two and three real processes."""

import pytest
import torch
import torch.distributed as dist

from accel.errors import CollectiveError
from accel.runtime import collectives
from accel.runtime.world import World
from accel.testing import run


def group():
    World.from_environment().connect("gloo", timeout=60)
    return dist.group.WORLD, dist.get_rank()


def gather_everything():
    pg, rank = group()
    value = {"x": torch.full((2, 3), rank), "n": [torch.tensor(float(rank)), torch.tensor([rank > 0])]}
    result = collectives.gather(value, pg)
    return result["x"][:, 0].tolist(), result["n"][0].tolist(), result["n"][1].tolist()


def test_gather_concatenates_in_the_order_of_ranks():
    assert run(3, gather_everything) == [([0, 0, 1, 1, 2, 2], [0.0, 1.0, 2.0], [False, True, True])] * 3


def gather_counts():
    pg, rank = group()
    rows = torch.arange(10 * rank, 10 * rank + [3, 2, 1][rank])
    alone = collectives.gather_counted(torch.tensor(rank + 0.5), (3, 2, 0), pg).tolist()
    for wrong in (rows[:1], rows[rank == 1 :], rows.repeat(9)):  # on all, on rank 1 alone, too many
        with pytest.raises(CollectiveError, match=r"rows for . samples"):
            collectives.gather_counted(wrong, (3, 2, 0), pg, most=4)
    return collectives.gather_counted(rows, (3, 2, 0), pg).tolist(), alone


def test_gather_counted_keeps_what_counts():
    assert run(3, gather_counts) == [([0, 1, 2, 10, 11], [0.5, 1.5])] * 3


def combine():
    pg, rank = group()
    value = torch.tensor([1.0, 2.0]) * (rank + 1)
    kept = value.clone()
    results = [
        collectives.reduce(value, pg, how, scale).tolist() for how, scale in (("sum", 1), ("mean", 1), ("sum", 0.5))
    ]
    assert torch.equal(value, kept), "reduce must not change its input"
    return results


def test_reduce_sums_and_averages():
    assert run(2, combine) == [[[3.0, 6.0], [1.5, 3.0], [1.5, 3.0]]] * 2


def pad():
    pg, rank = group()
    value = torch.ones(1, rank + 1)
    after = collectives.pad_across_processes(value, pg, dim=1, pad_index=7)
    before = collectives.pad_across_processes(value, pg, dim=-1, pad_index=7, pad_first=True)
    return after.tolist(), before.tolist()


def test_pad_across_processes():
    assert run(2, pad) == [([[1, 7]], [[7, 1]]), ([[1, 1]], [[1, 1]])]


def share():
    pg, rank = group()
    tensor = collectives.broadcast({"t": torch.tensor([rank])}, pg, source=1)["t"].tolist()
    return tensor, collectives.broadcast_object(f"from {rank}", pg, source=1), collectives.gather_object({rank}, pg)


def test_broadcast_and_objects():
    assert run(2, share) == [([1], "from 1", [{0}, {1}])] * 2


def disagree(call, shapes, dtypes):
    pg, rank = group()
    value = torch.zeros(shapes[rank], dtype=dtypes[rank])
    with pytest.raises(CollectiveError) as caught:
        getattr(collectives, call)(value, pg)
    return str(caught.value)


@pytest.mark.parametrize("call", ["gather", "reduce", "broadcast"])
def test_different_shapes_and_dtypes_are_an_error_that_names_both(call):
    first, second = run(2, disagree, call, [(2,), (3,)], [torch.float32, torch.int64])
    assert first == second
    assert "rank 0 has [2] torch.float32" in first
    assert "rank 1 has [3] torch.int64" in first


def test_what_holds_no_tensor_is_refused():
    with pytest.raises(CollectiveError, match="expected tensors, or containers of them, got str"):
        collectives.gather("text", None)


def test_alone_nothing_is_exchanged():
    assert collectives.gather(torch.tensor(2.0), None).tolist() == [2.0]
    assert collectives.reduce(torch.tensor([2.0]), None, "mean", 3).tolist() == [6.0]
    assert collectives.gather_object("x", None) == ["x"]
