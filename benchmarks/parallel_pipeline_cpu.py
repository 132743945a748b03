"""CPU time of a step in stages, beside torch's own pipelining of the same transformer, cut by hand.

    python benchmarks/parallel_pipeline_cpu.py [processes] [micro-batches]

Both train in the same processes, step by step in turns, on one thread each; the loss is a cross entropy of the logits.
Times are milliseconds of user and system time of all processes together, the median of steps; ratios are medians of
the ratios of neighbouring steps. `stored` is MB of parameters, gradients and AdamW's state on one process, the mean,
and `n x` its ratio to 1/n of those of the whole model.

Torch takes the mean of each micro-batch's loss as soon as the micro-batch is through. Here the loss is the user's, and
is known when all are: so `1f1b` computes activations again, all but those that it may keep, as torch does of all with a
checkpoint around each stage.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
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
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformer import BYTES, Block, Shape
from zero_contender import size_of, tensors

from accel import Accelerator
from accel.runtime.shards import Elsewhere
from accel.testing import run

SHAPE = Shape(width=256, layers=8, heads=4, vocabulary=1024, length=64, batch=16)
WARM_UP, STEPS = 2, 8
TORCH: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}
ROWS = [("gpipe", False), ("interleaved", False), ("zero_bubble", False), ("1f1b", True), ("1f1b", False)]
"""Schedules, and whether torch computes activations again too."""


class Model(nn.Module):
    """Tokens [b, t] -> logits [b, t, vocabulary]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.end = nn.Sequential(nn.LayerNorm(shape.width), nn.Linear(shape.width, shape.vocabulary, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.end(x)
        return out


class Stage(nn.Sequential):
    """Some consecutive modules; computes activations again in backward if asked to."""

    def __init__(self, modules: list[nn.Module], again: bool) -> None:
        super().__init__(*modules)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(super().forward, x, use_reentrant=False) if self.again else super().forward(x)
        return out


def make_model() -> Model:
    torch.manual_seed(0)
    return Model(SHAPE)


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def by_torch(schedule: str, again: bool, micro_batches: int, tokens: Tensor) -> tuple[nn.Module, Callable[[], Any]]:
    """What trains, and a step of it."""
    rank, size, model = dist.get_rank(), dist.get_world_size(), make_model()
    count = size * (2 if schedule == "interleaved" else 1)
    each = SHAPE.layers // count
    stages = []
    for index in range(rank, count, size):
        modules = list(model.blocks[index * each : (index + 1) * each])
        modules = [*([model.embedding] if index == 0 else []), *modules, *([model.end] if index == count - 1 else [])]
        stages.append(PipelineStage(Stage(modules, again), index, count, torch.device("cpu")))
    several = schedule in ("interleaved", "zero_bubble")
    made = TORCH[schedule](stages if several else stages[0], micro_batches, loss_fn=loss_of)
    given = ([tokens] if rank == 0 else []), ({"target": tokens} if rank == size - 1 else {})

    def step() -> None:
        made.step(*given[0], **given[1])

    return model, step


def by_accel(schedule: str, outputs: str, micro_batches: int, tokens: Tensor) -> tuple[nn.Module, Callable[[], Any]]:
    """The same by this project, with the same stages."""
    size = dist.get_world_size()
    count = size * (2 if schedule == "interleaved" else 1)
    options = {
        "schedule": schedule,
        "outputs": outputs,
        "micro_batches": micro_batches,
        "split": [f"blocks.{index * SHAPE.layers // count}" for index in range(1, count)],
        "example": {"tokens": f"int64[2, {SHAPE.length}] < {SHAPE.vocabulary}"},
    }
    accelerator = Accelerator(device="cpu", num_processes=size, strategies={"pipeline": options})
    model = accelerator.prepare(make_model())

    def step() -> None:
        accelerator.backward(loss_of(model(tokens), tokens))

    return model, step


def stored(model: nn.Module, step: Callable[[], Any]) -> int:
    """Bytes on this process after a step: parameters, gradients and the state of AdamW."""
    held = [parameter for parameter in model.parameters() if not isinstance(parameter, Elsewhere)]
    optimizer = torch.optim.AdamW(held)
    step()
    optimizer.step()
    return size_of([*held, *(parameter.grad for parameter in held), *tensors(optimizer.state)])


def work(schedule: str, again: bool, micro_batches: int) -> tuple[list[list[float]], int]:
    """CPU seconds of each step on this process: torch's, with `outputs: last` and with `all`; and what it stores."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tokens = torch.randint(SHAPE.vocabulary, (SHAPE.batch, SHAPE.length), generator=torch.Generator().manual_seed(1))
    contenders = [
        by_torch(schedule, again, micro_batches, tokens),
        by_accel(schedule, "last", micro_batches, tokens),
        by_accel(schedule, "all", micro_batches, tokens),
    ]
    found: list[list[float]] = [[], [], []]
    for _ in range(WARM_UP + STEPS):
        for seconds, (model, step) in zip(found, contenders, strict=True):
            dist.barrier()
            start = time.process_time()
            step()
            model.zero_grad()
            seconds.append(time.process_time() - start)
    return [seconds[WARM_UP:] for seconds in found], stored(*contenders[-1])


def main(processes: int, micro_batches: int) -> None:
    """Print a row for each schedule."""
    print(f"{processes} processes, {micro_batches} micro-batches, {SHAPE}")
    titles = ("torch ms", "last ms", "/ torch", "all ms", "/ torch", "stored", "n x")
    print(" " * 22 + "".join(f"  {title:>8}" for title in titles))
    whole = 4 * BYTES * sum(parameter.numel() for parameter in make_model().parameters())
    for schedule, again in ROWS:
        each, bytes_stored = zip(*run(processes, work, schedule, again, micro_batches, timeout=300), strict=True)
        torchs, last, every = (
            [1000 * sum(step) for step in zip(*kind, strict=True)] for kind in zip(*each, strict=True)
        )
        row = f"{schedule + (', torch recomputes' if again else ''):22}  {statistics.median(torchs):8.0f}"
        for ours in (last, every):
            ratio = statistics.median(a / b for a, b in zip(ours, torchs, strict=True))
            row += f"  {statistics.median(ours):8.0f}  {ratio:8.3f}"
        total = sum(bytes_stored)
        print(f"{row}  {total / processes / 1e6:8.1f}  {total / whole:8.3f}", flush=True)


if __name__ == "__main__":
    main(*(int(value) for value in [*sys.argv[1:], *("2", "8")[len(sys.argv) - 1 :]]))
