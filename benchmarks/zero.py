"""What the stages of ZeRO cost and save, beside plain torch.

    python benchmarks/zero.py [--processes 2] [--rounds 3]

A causal transformer of 20 M parameters, float32, AdamW, on gloo. Per process: CPU ms of a step, MiB of parameters,
gradients and optimizer state between backward and step, MiB of peak memory above what the process had before the
model; and MiB that a step sends over the loopback device, all processes together. Rows take turns, round after
round, and show medians. Sent bytes are exact where nothing else uses the device: as root, the benchmark runs itself
in a network namespace of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from accel import Accelerator
from accel.testing import run

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH, BATCH = 8192, 384, 8, 6, 128, 4
WARM_UP, STEPS = 3, 5
MIB = 1 << 20
PRIVATE = "ACCEL_BENCHMARK_PRIVATE_NETWORK"


class GPT(nn.Module):
    """Tokens [b, LENGTH + 1] -> loss"""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = {"dim_feedforward": 4 * WIDTH, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, HEADS, **layer) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tokens(tokens[:, :-1]) + self.positions.weight
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        return F.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), tokens[:, 1:].flatten())


Loop = tuple[nn.Module, torch.optim.Optimizer, Callable[[Tensor], Any]]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def torch_ddp(model: nn.Module) -> Loop:
    dist.init_process_group("gloo")
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return wrapped, adamw(wrapped), lambda loss: loss.backward()


def torch_fsdp2(model: nn.Module, reshard: bool = True) -> Loop:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=None if reshard else False)
    return model, adamw(model), lambda loss: loss.backward()


def torch_fsdp2_kept(model: nn.Module) -> Loop:
    return torch_fsdp2(model, reshard=False)


def accel_loop(strategy: str, model: nn.Module) -> Loop:
    accelerator = Accelerator(device="cpu", num_processes=int(os.environ["WORLD_SIZE"]), strategies=strategy)
    return *accelerator.prepare(model, adamw(model)), accelerator.backward


ROWS: dict[str, Callable[[nn.Module], Loop] | str] = {
    "torch DDP": torch_ddp,
    "torch FSDP2": torch_fsdp2,
    "torch FSDP2, gathered once": torch_fsdp2_kept,
    **{f"accel {name}": name for name in ("ddp", "zero1", "zero2", "zero3")},
}


def measure(row: str) -> list[float]:
    """CPU ms, sent MiB, then MiB of parameters, gradients, optimizer state and peak; all ranks."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    make = ROWS[row]
    base = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # lets the peak count from now
    torch.manual_seed(0)
    model, optimizer, backward = accel_loop(make, GPT()) if isinstance(make, str) else make(GPT())
    costs, held = [], []
    for step in range(WARM_UP + STEPS):
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        dist.barrier()
        cpu, sent = time.process_time(), sent_bytes()
        backward(model(tokens))
        held = [size(model.parameters()), size(p.grad for p in model.parameters())]
        optimizer.step(), optimizer.zero_grad()
        cpu = time.process_time() - cpu
        dist.barrier()
        costs.append((1e3 * cpu, (sent_bytes() - sent) / MIB))
    held.append(size(value for state in optimizer.state.values() for value in state.values()))
    medians = [statistics.median(column) for column in zip(*costs[WARM_UP:], strict=True)]
    return [*medians, *held, (memory("VmHWM") - base) / MIB]


def size(tensors: Any) -> float:
    """MiB that this process holds of some tensors."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local) / MIB


def sent_bytes() -> int:
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return sum(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:"))


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def in_private_network() -> None:
    """Start over in a network namespace of this benchmark's own, where that is allowed."""
    if os.geteuid() == 0 and shutil.which("unshare") and shutil.which("ip") and PRIVATE not in os.environ:
        os.environ[PRIVATE] = "1"
        inner = 'ip link set lo up && exec "$0" "$@"'
        os.execvp("unshare", ["unshare", "-n", "bash", "-c", inner, sys.executable, *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    in_private_network()
    found: dict[str, list[list[float]]] = {row: [] for row in ROWS}
    for _ in range(arguments.rounds):
        for row, results in found.items():
            results.append(run(arguments.processes, measure, row, timeout=300)[0])
    print("| | CPU ms | sent | parameters | gradients | optimizer | peak |\n|---|---|---|---|---|---|---|")
    for row, results in found.items():
        columns = [statistics.median(column) for column in zip(*results, strict=True)]
        print(f"| {row} | " + " | ".join(f"{value:.0f}" for value in columns) + " |")


if __name__ == "__main__":
    main()
