"""How long stages wait for one another, and what they send, beside torch's own pipelining of the same model.

    python benchmarks/parallel_pipeline.py
    python benchmarks/parallel_pipeline.py 4 8 --schedules 1f1b

The blocks sleep instead of computing, so that processes need no core of their own. Until all are at the end of
backward, a process waits while it neither sleeps nor uses CPU time, which has a benchmark of its own. Torch leaves the
output on the last process, as `outputs: last` does; under `all` it is sent to the others.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.utils._python_dispatch import TorchDispatchMode

from accel import Accelerator
from accel.runtime.shards import Elsewhere
from accel.runtime.world import World
from accel.testing import run

SECONDS = 0.01
"""What a block takes for a micro-batch in forward, for the gradient of its input, and for that of its weight."""

WIDTH, ROWS, BLOCKS, STEPS = 256, 4, 8, 5
BYTES = 4
TORCH: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}
"""Torch takes the loss of each micro-batch by itself, so that its zero bubble waits `(p - 1) / (3 m + p - 1)`."""


class _Sleep(torch.autograd.Function):
    """Sleeps forth and back, and notes for how long."""

    slept = 0.0

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        _sleep(SECONDS * seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        _sleep(SECONDS * ctx.seconds)
        return gradients[0], None


def _sleep(seconds: float) -> None:
    start = time.perf_counter() - time.thread_time()
    time.sleep(seconds)
    _Sleep.slept += time.perf_counter() - time.thread_time() - start


class Block(nn.Module):
    """A layer that takes a known time for a micro-batch. `batch` is the size of those for which it takes it."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch, self.layer = batch, nn.Linear(WIDTH, WIDTH)

    def time_weight(self) -> None:
        """Let the gradient of the weight take its time too; called once the parameter is the one that trains."""
        self.layer.weight.register_hook(lambda gradient: _sleep(SECONDS))  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Sleep.apply(self.layer(x), len(x) / self.batch)  # type: ignore[no-untyped-call]
        return out


class Model(nn.Sequential):
    """Blocks, one after another."""

    def __init__(self, batch: int) -> None:
        super().__init__(*(Block(batch) for _ in range(BLOCKS)))


def ours(schedule: str, micro_batches: int, outputs: str = "last") -> Any:
    """The parts of some steps that this process waits, and the bytes that it sends in one."""
    options = {"schedule": schedule, "micro_batches": micro_batches, "outputs": outputs}
    options["example"] = {"input": f"float32[2, {WIDTH}]"}
    accelerator = Accelerator(
        device="cpu", num_processes=World.from_environment().size, strategies={"pipeline": options}
    )
    model = accelerator.prepare(Model(batch=ROWS))
    for block in model:
        if not isinstance(block.layer.weight, Elsewhere):
            block.time_weight()
    x = torch.randn(ROWS * micro_batches, WIDTH)

    def step() -> None:
        accelerator.backward(model(x).square().mean())

    return _measure(step, STEPS if outputs == "last" else 0)


def torchs(schedule: str, micro_batches: int) -> Any:
    """The same for torch's own, whose stages have been written by hand."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    blocks = list(Model(batch=ROWS))
    for block in blocks:
        block.time_weight()
    count = size * (2 if schedule == "interleaved" else 1)
    each = BLOCKS // count
    stages = [
        PipelineStage(nn.Sequential(*blocks[index * each : (index + 1) * each]), index, count, torch.device("cpu"))
        for index in range(rank, count, size)
    ]
    made = TORCH[schedule](
        stages if schedule in ("interleaved", "zero_bubble") else stages[0],
        micro_batches,
        loss_fn=lambda out, _: out.square().mean(),
    )
    x = torch.randn(ROWS * micro_batches, WIDTH)

    def step() -> None:
        made.step(*([x] if rank == 0 else []), **({"target": x} if rank == size - 1 else {}))

    return _measure(step, STEPS)


class _Sent(TorchDispatchMode):
    """Counts the bytes that this process sends to another, or to each of the others."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__ if function.namespace == "c10d" else ""
        shares = name.startswith("broadcast") and dist.get_rank() == args[2]
        if name.startswith("send") or shares:
            size = sum(tensor.numel() * tensor.element_size() for tensor in args[0])
            self.bytes += size * (dist.get_world_size() - 1 if shares else 1)
        return function(*args, **(kwargs or {}))


def _measure(step: Any, steps: int) -> tuple[list[float], float]:
    step()  # shapes are told, connections made
    waits = []
    for _ in range(steps):
        dist.barrier()
        _Sleep.slept, start, computed = 0.0, time.perf_counter(), time.thread_time()
        step()
        dist.barrier()
        waits.append(1 - (_Sleep.slept + time.thread_time() - computed) / (time.perf_counter() - start))
    with _Sent() as sent:
        step()
    return waits, sent.bytes


def waits_formula(schedule: str, p: int, m: int) -> float:
    """What part of a step processes wait, where all three parts of the work of a block take equally long."""
    if schedule == "zero_bubble":
        return 2 * (p - 1) / (3 * m + 2 * (p - 1))
    return (p - 1) / ((2 if schedule == "interleaved" else 1) * m + p - 1)


def bytes_formula(schedule: str, p: int, m: int, outputs: str) -> float:
    """What all processes together send in a step: hidden states from stage to stage, and their gradients back.

    To these comes the output, which the last process sends to each of the others, or a loss in its place.
    """
    hidden = BYTES * ROWS * m * WIDTH
    borders = (2 * p if schedule == "interleaved" else p) - 1
    return 2 * borders * hidden + (p - 1) * (hidden if outputs == "all" else BYTES)


def main() -> None:
    """Print a row for each schedule."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("processes", type=int, nargs="?", default=2)
    parser.add_argument("micro_batches", type=int, nargs="?", default=8)
    parser.add_argument("--schedules", nargs="+", choices=TORCH, default=TORCH)
    options = parser.parse_args()
    p, m = options.processes, options.micro_batches
    print(f"{p} processes, {m} micro-batches, {BLOCKS} blocks; waits are the mean over processes, KB of all together")
    print("waits".rjust(38) + "outputs: last".rjust(40) + "outputs: all".rjust(24))
    titles = ("formula", "torch", "accel", "torch KB", "KB", "/ torch", "/ formula", "KB", "/ formula")
    print(" " * 12 + "".join(f"{title:>10}" for title in titles))
    for schedule in options.schedules:
        torch_waits, torch_bytes = _of_all(p, torchs, schedule, m)
        waits, last = _of_all(p, ours, schedule, m)
        every = sum(sent for _, sent in run(p, ours, schedule, m, "all", timeout=120))
        numbers = [waits_formula(schedule, p, m), torch_waits, waits, torch_bytes / 1e3, last / 1e3, last / torch_bytes]
        numbers += [last / bytes_formula(schedule, p, m, "last"), every / 1e3]
        numbers += [every / bytes_formula(schedule, p, m, "all")]
        print(f"{schedule:12}" + "".join(f"{number:10.3f}" for number in numbers), flush=True)


def _of_all(processes: int, *work: Any) -> tuple[float, float]:
    """The median of the steps' waits, each the mean over processes; the bytes of all."""
    found = run(processes, *work, timeout=120)
    steps = zip(*(waits for waits, _ in found), strict=True)
    return statistics.median(map(statistics.mean, steps)), sum(sent for _, sent in found)


if __name__ == "__main__":
    main()
