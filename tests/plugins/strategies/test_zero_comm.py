"""What the processes of a divided model send each other directly, beside the same by torch's own collectives."""

from __future__ import annotations

import gc
import time

import pytest
import torch
import torch.distributed as dist
from accel_plugins.strategies.zero import comm
from accel_plugins.strategies.zero.comm import Peers
from accel_plugins.strategies.zero.groups import groups_of
from accel_plugins.strategies.zero.memory import Spare
from torch.distributed.fsdp import fully_shard

from accel import Accelerator
from accel.testing import run

from .zero_models import accelerator_for, make

LENGTHS = [1, 2, 7, 64, 1000]
"""Numbers in a tensor: fewer than processes, uneven, and more than are received at once."""


def random(*key, count, dtype):
    return torch.randn(count, generator=torch.Generator().manual_seed(hash(key) % 1000)).to(dtype)


def exchanged(dtype, lot, small):
    """Reduces and gathers tensors of all lengths; returns what differs from sums made here, and means over ranks."""
    Accelerator(device="cpu", strategies="ddp")
    comm._LOT_BYTES, comm._SMALL_BYTES = lot, small
    peers = Peers(dist.group.WORLD, torch.device("cpu"))
    rank, size = peers.rank, peers.size
    means, gathered = [], []
    for count in LENGTHS:
        length = -(-count // size)
        own = max(min(count - rank * length, length), 0)
        means.append(torch.full((own,), float("nan")))
        peers.reduce(means[-1], random(count, rank, count=count, dtype=dtype), length)
    peers.finish()
    for count in LENGTHS:
        gathered.append(torch.full((size * count,), float("nan"), dtype=dtype))
    peers.gather(
        [(gathered[place], random(count, rank, count=count, dtype=dtype)) for place, count in enumerate(LENGTHS)]
    ).wait()
    return means, gathered


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lot", "small"), [(512, 64), (8 << 20, 1 << 16)])
def test_means_and_wholes(size, dtype, lot, small):
    """Means are computed in float32, whatever was sent, and in the order of the ranks: the same to the last bit."""
    results = run(size, exchanged, dtype, lot, small)
    for place, count in enumerate(LENGTHS):
        wholes = [random(count, rank, count=count, dtype=dtype) for rank in range(size)]
        mean = wholes[0].float()
        for whole in wholes[1:]:
            mean = mean + whole
        found = torch.cat([means[place] for means, _ in results])
        assert found.equal(mean / size), count
        for _, gathered in results:
            assert gathered[place].equal(torch.cat(wholes)), count


MANY = 1 << 20
"""Numbers in a tensor that a connection does not take at once: the rest is sent from where it lies."""


def let_go(late):
    """Sends and receives with nobody left but the messages to hold the memory; one rank begins later."""
    accelerator = Accelerator(device="cpu", strategies="ddp")
    peers = Peers(dist.group.WORLD, torch.device("cpu"))
    if peers.rank == late:
        time.sleep(0.2)
    whole, mean = torch.empty(peers.size * MANY), torch.empty(MANY)
    messages = peers.gather([(whole, torch.full((MANY,), float(peers.rank)))])
    others = [torch.full((MANY,), float("nan")) for _ in range(4)]  # takes what would be free
    peers.reduce(mean, torch.full((peers.size * MANY,), float(peers.rank)), MANY)
    dist.all_reduce(torch.ones(1))  # gloo's threads meanwhile do something else
    messages.wait()
    peers.finish()
    del others
    accelerator.wait_for_everyone()
    return whole.view(peers.size, -1).unique(dim=1).flatten().tolist(), mean.unique().tolist()


@pytest.mark.parametrize("late", [0, 1])
def test_what_is_under_way_keeps_its_memory(late):
    assert run(2, let_go, late) == [([0, 1], [0.5])] * 2


def left_alone():
    """Rank 1 leaves in the midst of a message; rank 0 is told so, and goes on with its memory whole."""
    Accelerator(device="cpu", strategies="ddp")
    peers = Peers(dist.group.WORLD, torch.device("cpu"))
    messages = peers.gather([(torch.empty(2 * MANY), torch.ones(MANY))])
    dist.barrier()
    if peers.rank == 1:
        dist.destroy_process_group()
        return "left"
    messages.wait()
    messages = peers.gather([(torch.empty(2 * MANY), torch.ones(MANY))])
    with pytest.raises(RuntimeError):
        messages.wait()
    del messages
    gc.collect()
    return [torch.full((MANY,), float(value)).sum().item() / MANY for value in range(4)]


def test_a_peer_that_leaves_is_an_error():
    assert run(2, left_alone) == [[0, 1, 2, 3], "left"]


def divided_meanwhile():
    """Between the beginning and the end of gathering, somebody asks that all be divided."""
    accelerator = accelerator_for("zero3")
    model, reference = accelerator.prepare(make()), make()
    groups = [group for state in fully_shard.state(model)._state_ctx.all_states for group in groups_of(state)]
    for group in groups:
        group.unshard()
        group.reshard()
        group.wait_for_unshard()
    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    storages = [{p._unsharded_param.untyped_storage().data_ptr() for p in group.fsdp_params} for group in groups]
    accelerator.wait_for_everyone()
    same = all(whole[name].equal(parameter) for name, parameter in reference.named_parameters())
    return same, [len(found) for found in storages]


def test_a_group_that_is_being_gathered_is_not_freed():
    """And it has one memory, not one for each parameter."""
    assert run(2, divided_meanwhile) == [(True, [1] * 4)] * 2


@pytest.mark.skipif(not hasattr(torch.UntypedStorage, "_swap_data_ptr_"), reason="torch 2.13 lets memory change hands")
def test_a_block_takes_the_memory_of_the_one_before():
    """If it wants as much; and nothing is spare once it is dropped."""
    spare = Spare()
    one, same, larger = (torch.empty(0, dtype=torch.uint8).untyped_storage() for _ in range(3))
    spare.fill(one, 1 << 16)
    one.fill_(7)
    spare.empty(one)
    spare.fill(same, 1 << 16)
    assert one.size() == 0 and same.tolist() == [7] * (1 << 16)
    spare.empty(same)
    spare.fill(larger, 1 << 17)
    assert same.size() == 0 and larger.size() == 1 << 17
    spare.empty(larger)
    spare.drop()
    spare.fill(one, 1 << 17)
    assert one.size() == 1 << 17
