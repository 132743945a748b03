"""What ZeRO-3 and hybrid sharding store and send on thousands of processes, found out on one.

    python benchmarks/zero_scale.py
    python benchmarks/zero_scale.py --processes 8 --width 512 --layers 4

The strategy itself sets up the model and trains a step of it, with torch's fake process group, which only says that
a collective is done, and fake tensors, which have sizes but no memory. Two and three layers are built, and the
identical ones extrapolated: what a layer adds, it adds each time. Gradients, optimizer state and what is gathered
are in float32. The one thing left out is the exchange of a few bytes about unused parameters, whose answer fake
tensors cannot know.

- stored: GB of parameters, gradients and optimizer state (AdamW) on one process, between backward and step.
- sent: GB that one process sends in a step.
- formula: that of the ZeRO paper; the last block, and what no block holds, are gathered once a step, not twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # which registers the backend "fake"
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from traffic import Traffic
from transformer import Formula, Shape, Transformer, count, make_optimizer

from accel import registry
from accel.interfaces import Axis, Precision, Strategy
from accel.runtime.mesh import Mesh
from accel.runtime.world import World

SEVEN_BILLION = Shape(width=4096, layers=32, heads=32, vocabulary=32000, length=2048, batch=1)
BUILT = 2, 3
"""Layers that are built; from the difference come the others."""

GB = 1e9
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Found:
    """Bytes on one process: what it stores, and what it sends in a step."""

    stored: float
    sent: float


@contextmanager
def pretend(sizes: dict[Axis, int]) -> Iterator[Mesh]:
    """A mesh of these sizes, of whose processes this is the first and the others do not exist."""
    processes = math.prod(sizes.values())
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=processes)
    try:
        world = World(rank=0, size=processes, local_rank=0, local_size=processes)
        yield Mesh(sizes, world, CPU.type, lambda: None)
    finally:
        dist.destroy_process_group()


def make_strategy(mesh: Mesh, name: str, replicas: int = 1) -> Strategy:
    """One of the stages of ZeRO, as an Accelerator makes it."""
    plugin = registry.load("strategy", name)
    options = plugin.Options(replicas=replicas, find_unused_parameters=False)
    strategy: Strategy = plugin(options, mesh.axis(Axis.DATA), CPU, Precision(Precision.Options(), CPU))
    return strategy


def train_a_step(shape: Shape, processes: int, replicas: int) -> Found:
    """Set up the model on so many processes and train it for a step."""
    with pretend({Axis.DATA: processes}) as mesh:
        strategy, fake = make_strategy(mesh, "zero3", replicas), FakeTensorMode()
        with fake:
            model, tokens = Transformer(shape), torch.zeros(shape.batch, shape.length + 1, dtype=torch.int64)
        strategy.setup(model)
        strategy.after_step(model)  # before the first step values are compared, which fake tensors do not have
        optimizer = make_optimizer(model)
        with fake, Traffic() as traffic:
            loss = strategy.before_backward(model, model(tokens), exchange=True)
            loss.backward()  # type: ignore[no-untyped-call]
            strategy.after_backward(model, exchange=True)
            optimizer.step()
        found = Found(stored(model, optimizer), traffic.sent)
        strategy.release()
    return found


def stored(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Bytes of parameters, gradients and optimizer state that this process stores."""
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    states = [value for state in optimizer.state.values() for value in state.values()]
    return size_of([*parameters, *gradients, *states])


def size_of(tensors: Iterable[Tensor]) -> float:
    """Bytes of the memory behind tensors, each counted once; of a DTensor, this process's part."""
    storages = [getattr(tensor, "_local_tensor", tensor).untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def extrapolate(shape: Shape, processes: int, replicas: int) -> Found:
    """What a model of all layers would take, from what two small ones do."""
    small, large = (train_a_step(dataclasses.replace(shape, layers=n), processes, replicas) for n in BUILT)
    more = (shape.layers - BUILT[1]) / (BUILT[1] - BUILT[0])
    return Found(
        stored=large.stored + more * (large.stored - small.stored), sent=large.sent + more * (large.sent - small.sent)
    )


def formula(shape: Shape, processes: int, replicas: int) -> Formula:
    """What the paper says of the same run."""
    gathered_once = count(dataclasses.replace(shape, layers=1))
    return Formula(3, count(shape), processes // replicas, replicas, kept=gathered_once)


def grids(processes: int) -> list[tuple[int, int]]:
    """Replicas and shards: all processes divide one model; and 8 do, or half, as they would within a machine."""
    shards = 8 if processes > 8 else processes // 2
    return [(1, processes), (processes // shards, shards)]


def row(shape: Shape, processes: int, replicas: int, shards: int) -> list[Any]:
    start = time.perf_counter()
    found, wanted = extrapolate(shape, processes, replicas), formula(shape, processes, replicas)
    stored = f"{found.stored / GB:.3f}", f"{wanted.stored / GB:.3f}", f"{found.stored / wanted.stored:.3f}"
    sent = f"{found.sent / GB:.2f}", f"{wanted.sent / GB:.2f}", f"{found.sent / wanted.sent:.3f}"
    kind = "zero3" if replicas == 1 else f"zero3, replicas: {replicas}"
    return [processes, kind, *stored, *sent, f"{time.perf_counter() - start:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[8, 64, 512, 4096])
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, default=getattr(SEVEN_BILLION, field.name))
    options = parser.parse_args()
    shape = Shape(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Shape)})
    layers = f"{BUILT[0]} and {BUILT[1]} layers built, {shape.layers} extrapolated"
    print(f"{count(shape) / 1e9:.2f} B parameters in float32, AdamW; GB on each process; {layers}\n")
    print("| processes | strategy | stored | formula | ratio | sent | formula | ratio | seconds |\n" + "|---" * 9 + "|")
    for processes in options.processes:
        for replicas, shards in grids(processes):
            print("|", " | ".join(map(str, row(shape, processes, replicas, shards))), "|", flush=True)


if __name__ == "__main__":
    main()
