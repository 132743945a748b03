"""What a library adds to each step of a hand-written torch loop, on one process.

    python benchmarks/overhead.py

Every contender trains the same tiny model, so that a step is almost nothing but overhead. They take turns in one
process, a block of steps each, round after round; a row shows the median over the rounds of its block's time per
step less the plain loop's of the same round, so that what the machine does to one it does to all. Peers that are
not installed are left out (`pip install 'accel-torch[bench]'`).
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Step = Callable[[Tensor], None]
Loop = Callable[[], None]


def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of 20 parameters in two tensors and its optimizer."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3)


def loader(batches: int) -> DataLoader[Any]:
    """Batches of one sample."""
    return DataLoader(TensorDataset(torch.randn(batches, 4)), batch_size=1)


def plain(batches: int) -> tuple[Step, Loop]:
    """Torch by hand."""
    model, optimizer = parts()
    data = loader(batches)
    return steps(model, optimizer, Tensor.backward, data)


def accel(batches: int) -> tuple[Step, Loop]:
    """This project."""
    from accel import Accelerator

    accelerator = Accelerator(device="cpu")
    model, optimizer, data = accelerator.prepare(*parts(), loader(batches))
    return steps(model, optimizer, accelerator.backward, data)


def accelerate(batches: int) -> tuple[Step, Loop]:
    """Hugging Face Accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, data = accelerator.prepare(*parts(), loader(batches))
    return steps(model, optimizer, accelerator.backward, data)


def fabric(batches: int) -> tuple[Step, Loop]:
    """Lightning Fabric."""
    from lightning_fabric import Fabric

    lightning = Fabric(accelerator="cpu", devices=1)
    model, optimizer = lightning.setup(*parts())
    return steps(model, optimizer, lightning.backward, lightning.setup_dataloaders(loader(batches)))


CONTENDERS = {"torch by hand": plain, "accel": accel, "accelerate": accelerate, "lightning_fabric": fabric}


def steps(model: Any, optimizer: Any, backward: Callable[[Tensor], None], data: Any) -> tuple[Step, Loop]:
    """The same loop for everybody: one step on a given batch, and one epoch over the loader."""

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        backward(loss)
        optimizer.step()

    def loop() -> None:
        for (x,) in data:
            step(x)

    return step, loop


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rounds(
    contenders: dict[str, tuple[Step, Loop]], count: int, batches: int
) -> Iterator[dict[str, tuple[float, float]]]:
    """Microseconds per step of each contender, without and with its loader, round by round."""
    x = torch.randn(1, 4)
    for _ in range(count):
        found = {}
        for name, (step, loop) in contenders.items():
            alone = seconds(lambda step=step: [step(x) for _ in range(batches)])  # type: ignore[misc]
            found[name] = (alone / batches * 1e6, seconds(loop) / batches * 1e6)
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30, help="rounds of turns")
    parser.add_argument("--steps", type=int, default=300, help="steps of a turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    installed = {name: make for name, make in CONTENDERS.items() if " " in name or importlib.util.find_spec(name)}
    contenders = {name: make(options.steps) for name, make in installed.items()}
    next(rounds(contenders, 1, options.steps))  # warm up
    results = list(rounds(contenders, options.rounds, options.steps))
    print(f"microseconds per step, median of {options.rounds} rounds of {options.steps} steps")
    print(f"{'':18}{'step':>8}{'added':>8}{'with loader':>14}{'added':>8}")
    for name in contenders:
        columns = []
        for column in (0, 1):
            columns.append(statistics.median(r[name][column] for r in results))
            columns.append(statistics.median(r[name][column] - r["torch by hand"][column] for r in results))
        print(f"{name:18}{columns[0]:8.1f}{columns[1]:8.1f}{columns[2]:14.1f}{columns[3]:8.1f}")


if __name__ == "__main__":
    main()
