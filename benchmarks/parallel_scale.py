"""What a process stores and sends in three dimensions on a thousand processes, found out on one.

    python benchmarks/parallel_scale.py
    python benchmarks/parallel_scale.py --pipeline 4 --data 4 --tensor 2 --width 512 --layers 8

The layers that `tensor` makes and the strategy of the data axis work as in a real run, on real tensors, with torch's
fake process group, which only says that a collective is done: what is computed is nonsense, of the right size. One and
two blocks of a stage are built, and the identical ones extrapolated: what a block adds, it adds each time. `tensor` is
told the plan that it would find, since what it finds it checks against values. The pipeline's own traffic is the hidden
states of each micro-batch, forth, and their gradients, back. Everything is in float32, with AdamW.

- stored: GB of parameters, gradients and optimizer state on one process, between backward and step.
- sent: GB that one process sends in a step, along each axis.
- formula: 1/(pipeline x tensor) of the stage's parameters (positions and norms whole), divided as the ZeRO paper says
  (Rajbhandari et al. 2020; all stages here store only parts between steps, as its third), and the all-reduces of
  Narayanan et al. 2021, section 3.2: two forward and two backward for each block and micro-batch.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from accel_plugins.strategies.tensor.layers import apply
from parallel_tensor import Block
from torch import Tensor, nn
from traffic import Traffic
from transformer import BYTES, Formula, Shape, make_optimizer
from zero import show
from zero_scale import GB, SEVEN_BILLION, make_strategy, pretend, stored

from accel.interfaces import Axis
from accel.runtime.divided.peers import Peers
from accel.runtime.mesh import Mesh

COLUMNS, ROWS = ("query", "key", "value", "up"), ("output", "down")
BUILT = 1, 2
"""Blocks that are built; from the difference come the others."""


@dataclass(frozen=True)
class Found:
    """Bytes of one process: stored, and sent in a step along the tensor axis and the data axis."""

    stored: float
    tensor: float
    data: float


class Stage(nn.Module):
    """What a process along the pipeline keeps: some blocks; the first also the embeddings, the last the head."""

    def __init__(self, shape: Shape, blocks: int, first: bool, last: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width) if first else None
        self.places = nn.Embedding(shape.length, shape.width) if first else None
        self.blocks = nn.ModuleList(Block(shape) for _ in range(blocks))
        self.norm = nn.LayerNorm(shape.width) if last else None
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False) if last else None

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None and self.places is not None:
            x = self.embedding(x) + self.places(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return x if self.head is None or self.norm is None else self.head(self.norm(x))


def divide(stage: nn.Module, mesh: Mesh) -> None:
    """Divide the layers of a stage along the tensor axis, as `tensor` does once it has found its plan."""
    axis = mesh.axis(Axis.TENSOR)
    styles = {"embedding": ("vocabulary", 1), "head": ("column", 1)}
    for name, _ in stage.named_modules():
        last = name.rpartition(".")[2]
        styles |= {name: ("column", 1)} if last in COLUMNS else {name: ("row", 1)} if last in ROWS else {}
    apply(stage, styles, Peers(axis.size, axis.index, axis.size, axis.group), axis.device_mesh)


def train_a_step(shape: Shape, sizes: dict[Axis, int], name: str, blocks: int, first: bool, last: bool) -> Found:
    """Set up one stage and train it for a step of one micro-batch."""
    with pretend(sizes) as mesh:
        stage = Stage(shape, blocks, first, last)
        divide(stage, mesh)
        strategy = make_strategy(mesh, name)
        strategy.setup(stage)
        optimizer = make_optimizer(stage)
        hidden = torch.zeros(1, shape.length, shape.width, requires_grad=True)
        with Traffic() as traffic:
            output = stage(torch.zeros(1, shape.length, dtype=torch.int64) if first else hidden)
            strategy.before_backward(stage, output, exchange=False)
            output.sum().backward()
            strategy.after_backward(stage, exchange=False)
            strategy.exchange(stage)
        optimizer.step()
        return Found(stored(stage, optimizer), traffic.among[sizes[Axis.TENSOR]], traffic.among[sizes[Axis.DATA]])


def extrapolate(shape: Shape, sizes: dict[Axis, int], name: str, first: bool, last: bool) -> Found:
    """What all blocks of a stage would take, from what one and two do."""
    small, large = (dataclasses.astuple(train_a_step(shape, sizes, name, n, first, last)) for n in BUILT)
    more = shape.layers // sizes[Axis.PIPELINE] - BUILT[1]
    return Found(*(b + more * (b - a) for a, b in zip(small, large, strict=True)))


def formula(shape: Shape, sizes: dict[Axis, int], stage: int, first: bool, last: bool) -> Found:
    """What the papers say of the same."""
    blocks, outside = shape.layers // sizes[Axis.PIPELINE], shape.vocabulary * shape.width * (first + last)
    whole = shape.length * shape.width * first + shape.width * (4 * blocks + 2 * last)
    parameters = (12 * shape.width**2 * blocks + outside) // sizes[Axis.TENSOR] + whole
    shards = sizes[Axis.DATA]
    all_reduce = 2 * BYTES * shape.length * shape.width * (sizes[Axis.TENSOR] - 1) / sizes[Axis.TENSOR]
    gathered = BYTES * shape.length * shape.vocabulary * (sizes[Axis.TENSOR] - 1) / sizes[Axis.TENSOR]
    tensor = all_reduce * (4 * blocks + first + last) + gathered * last
    return Found(Formula(3, parameters, shards).stored, tensor, Formula(stage, parameters, shards).sent)


def row(shape: Shape, sizes: dict[Axis, int], name: str, stage: str, micro_batches: int) -> list[str]:
    first, last = stage == "first", stage == "last"
    found = extrapolate(shape, sizes, name, first, last)
    wanted = formula(shape, sizes, int(name[-1]), first, last)
    hidden = BYTES * shape.length * shape.width * micro_batches * (2 - first - last)
    cells = [stage, f"{found.stored / GB:.3f}", f"{found.stored / wanted.stored:.3f}"]
    cells += [f"{found.tensor * micro_batches / GB:.2f}", f"{found.tensor / wanted.tensor:.3f}"]
    return [*cells, f"{found.data / GB:.3f}", f"{found.data / wanted.data:.3f}", f"{hidden / GB:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for axis, size in {Axis.PIPELINE: 8, Axis.DATA: 16, Axis.TENSOR: 8}.items():
        parser.add_argument(f"--{axis}", type=int, default=size)
    parser.add_argument("--strategy", default="zero1", choices=["zero1", "zero2", "zero3"], help="along the data axis")
    parser.add_argument("--micro_batches", type=int, default=32, help="of one sequence each")
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, default=getattr(SEVEN_BILLION, field.name))
    options: Any = parser.parse_args()
    shape = Shape(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Shape)})
    sizes = {axis: getattr(options, axis) for axis in (Axis.PIPELINE, Axis.DATA, Axis.TENSOR)}
    rows = [["stage", "stored", "/ formula", "tensor", "/ formula", options.strategy, "/ formula", "pipeline"]]
    rows += [row(shape, sizes, options.strategy, stage, options.micro_batches) for stage in ("first", "middle", "last")]
    axes = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    print(f"{axes}; GB on one process, sent in a step of {options.micro_batches} micro-batches")
    show(rows)


if __name__ == "__main__":
    main()
