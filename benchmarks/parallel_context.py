"""What context parallelism saves and sends: a transformer on one long sequence, on one process and on several.

    python benchmarks/parallel_context.py
    python benchmarks/parallel_context.py --length 16384 --processes 2 8

- peak: MB of tensors alive at once in forward and backward, beyond weights and gradients, on one process; beside it
  the ratio to 1/n of what one process needs for the whole sequence.
- sent: MB that one process sends in a step, beside the ratio to `formula`.
- loss: the relative difference to that of one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from traffic import Traffic
from transformer import BYTES, Shape, Transformer

from accel import Accelerator
from accel.testing import run

MB = 1e6
DEFAULTS = {"length": 4096, "batch": 1, "layers": 4, "heads": 8, "vocabulary": 256}
ATTENTION = ("ulysses", "ring")


class Live(TorchDispatchMode):
    """While entered, follows the bytes of all tensors that are made and still alive; `peak` is their largest sum.

    `before` are tensors that were there before.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in before}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.finalize(storage, self._forget, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        if self.known.pop(key, None):
            self.now -= size


def measured(shape: Shape, processes: int, attention: str) -> dict[str, float]:
    """Of one process of a run: peak, sent and formula in bytes, and the loss."""
    strategies: Any = {"context": {"size": processes, "attention": attention}} if processes > 1 else "single"
    accelerator = Accelerator(strategies=strategies, num_processes=processes, device="cpu")
    torch.manual_seed(0)
    model = Backbone(shape)
    accelerator.prepare(model)
    tokens = torch.randint(shape.vocabulary, (shape.batch, shape.length), generator=torch.Generator().manual_seed(1))
    for parameter in model.parameters():  # gradients are there before, so that the peak is of activations
        parameter.grad = torch.zeros_like(parameter)
    before = [tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad)]
    with Live(before) as live, Traffic() as traffic:
        loss = model(tokens)
        accelerator.backward(loss)
    return {
        "peak": live.peak,
        "sent": traffic.sent,
        "formula": formula(shape, processes, attention, sum(p.numel() for p in model.parameters())),
        "loss": loss.item(),
    }


class Backbone(Transformer):
    """Tokens [b, t] -> a scalar, without a head over the vocabulary, whose outputs are the user's, and whole."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x).square().mean(-1).sum() / tokens.numel()


def formula(shape: Shape, processes: int, attention: str, parameters: int) -> float:
    """Bytes that one process sends in a step: for each block forward and backward, and the mean of the gradients.

    By heads, query, key, value and outputs change places, of each of which (n - 1)/n leaves. In a ring, keys and
    values are passed on n - 1 times in forward and in backward, and their gradients n times.
    """
    n, part = processes, shape.batch * shape.length * shape.width / processes
    block = 2 * 4 * (n - 1) / n * part if attention == "ulysses" else (2 * 2 * (n - 1) + 2 * n) * part
    return BYTES * (shape.layers * block + 2 * (n - 1) / n * parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for field in dataclasses.fields(Shape):
        default = DEFAULTS.get(field.name, field.default)
        parser.add_argument(f"--{field.name}", type=int, default=default)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    shape = Shape(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Shape)})
    [one] = run(1, measured, shape, 1, "ulysses", timeout=500)
    print(f"{shape.length} positions on one process: peak {one['peak'] / MB:.0f} MB")
    for processes in options.processes:
        for attention in ATTENTION:
            found = run(processes, measured, shape, processes, attention, timeout=500)
            mean = {what: statistics.mean(result[what] for result in found) for what in one}
            print(
                f"{processes} processes, {attention}: peak {mean['peak'] / MB:.0f} MB, "
                f"{mean['peak'] * processes / one['peak']:.3f} x 1/n; sent {mean['sent'] / MB:.1f} MB, "
                f"{mean['sent'] / mean['formula']:.3f} x formula; loss {abs(mean['loss'] / one['loss'] - 1):.0e}"
            )


if __name__ == "__main__":
    main()
