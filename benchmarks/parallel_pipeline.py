"""How long stages wait for one another, and what they send, beside torch's own pipelining of the same model.

    python benchmarks/parallel_pipeline.py [processes] [micro-batches]

The blocks sleep instead of computing, so that processes need no core of their own: what is left is waiting. A process
waits for `1 - busy / whole` of the time from the beginning of forward to the end of backward. Bytes are those with
`outputs: last`, as torch leaves the output there too, and with `all`.
"""

from __future__ import annotations

import sys
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

WIDTH, BLOCKS, STEPS = 64, 8, 5
TORCH: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}
"""Torch takes the loss of each micro-batch by itself, so that its zero bubble waits `(p - 1) / (3 m + p - 1)`."""


class _Sleep(torch.autograd.Function):
    """Sleeps forth and back, and notes for how long."""

    busy = 0.0

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
    start = time.perf_counter()
    time.sleep(seconds)
    _Sleep.busy += time.perf_counter() - start


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


def ours(schedule: str, micro_batches: int, outputs: str = "last") -> tuple[float, float]:
    """The part of a step that this process waits, and the bytes that it sends in one."""
    options = {"schedule": schedule, "micro_batches": micro_batches, "outputs": outputs}
    options["example"] = {"input": f"float32[2, {WIDTH}]"}
    accelerator = Accelerator(
        device="cpu", num_processes=World.from_environment().size, strategies={"pipeline": options}
    )
    model = accelerator.prepare(Model(batch=4))
    for block in model:
        if not isinstance(block.layer.weight, Elsewhere):
            block.time_weight()
    x = torch.randn(4 * micro_batches, WIDTH)

    def step() -> None:
        accelerator.backward(model(x).square().mean())

    return _measure(step)


def torchs(schedule: str, micro_batches: int) -> tuple[float, float]:
    """The same for torch's own, whose stages have been written by hand."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    blocks = list(Model(batch=4))
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
    x = torch.randn(4 * micro_batches, WIDTH)

    def step() -> None:
        made.step(*([x] if rank == 0 else []), **({"target": x} if rank == size - 1 else {}))

    return _measure(step)


class _Sent(TorchDispatchMode):
    """Counts the bytes that this process sends to another, or to all others."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__ if function.namespace == "c10d" else ""
        if name.startswith("send") or (name.startswith("broadcast") and dist.get_rank() == args[2]):
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in args[0])
        return function(*args, **(kwargs or {}))


def _measure(step: Any) -> tuple[float, float]:
    step()  # shapes are told, connections made
    waits = []
    for _ in range(STEPS):
        dist.barrier()
        _Sleep.busy, start = 0.0, time.perf_counter()
        step()
        waits.append(1 - _Sleep.busy / (time.perf_counter() - start))
    with _Sent() as sent:
        step()
    return min(waits), sent.bytes


def _formula(schedule: str, p: int, m: int) -> float:
    """What part of a step processes wait, where all three parts of the work of a block take equally long."""
    if schedule == "zero_bubble":
        return 2 * (p - 1) / (3 * m + 2 * (p - 1))
    return (p - 1) / ((2 if schedule == "interleaved" else 1) * m + p - 1)


def main(processes: int, micro_batches: int) -> None:
    """Print a row for each schedule."""
    p, m = processes, micro_batches
    print(f"{p} processes, {m} micro-batches, {BLOCKS} blocks; waits are the mean over processes, KB of all together")
    print(f"{'':12}  {'formula':>8}  {'torch':>8}  {'accel':>8}  {'torch KB':>9}  {'last KB':>9}  {'all KB':>9}")
    for schedule in TORCH:
        formula = _formula(schedule, p, m)
        found = [run(p, *each, timeout=120) for each in ((torchs, schedule, m), (ours, schedule, m))]
        found.append(run(p, ours, schedule, m, "all", timeout=120))
        waits = [sum(wait for wait, _ in each) / p for each in found]
        kilobytes = [sum(sent for _, sent in each) / 1e3 for each in found]
        print(
            f"{schedule:12}  {formula:8.3f}  {waits[0]:8.3f}  {waits[1]:8.3f}  {kilobytes[0]:9.1f}"
            f"  {kilobytes[1]:9.1f}  {kilobytes[2]:9.1f}"
        )


if __name__ == "__main__":
    main(*(int(value) for value in [*sys.argv[1:], *("2", "8")[len(sys.argv) - 1 :]]))
