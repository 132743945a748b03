"""What the processes of a divided model send each other directly, beside the same by torch's own collectives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from accel_plugins.strategies.zero import comm
from accel_plugins.strategies.zero.comm import Peers

from accel import Accelerator
from accel.testing import run

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
