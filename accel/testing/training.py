"""One training run, done twice: by a plain torch loop in one process, and by accel on any number of them.

The plain loop is the reference for parity: it uses nothing of accel, and the whole global batch at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from ..accelerator import Accelerator
from ..config import Config
from ..interfaces import Axis
from ..runtime.world import World
from .models import TASKS

LOSS_SCALE = 1024.0
"""The plain loop's in float16: without it small gradients become 0, with torch's 65536 the largest overflow."""

EPSILON = 1e-3
"""AdamW's: above the rounding of gradients, whose sign would decide the update where a gradient is about zero."""


def adamw(model: nn.Module) -> Optimizer:
    """AdamW over all parameters that train."""
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=EPSILON)


def sgd(model: nn.Module) -> Optimizer:
    """SGD with momentum over all parameters that train."""
    return SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def two_groups(model: nn.Module) -> Optimizer:
    """AdamW that decays matrices only, and takes them at another learning rate than the rest."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "lr": 3e-2, "weight_decay": 0.0}]
    return AdamW(groups, lr=1e-2, eps=EPSILON)


@dataclass(frozen=True)
class Run:
    """What is trained. `batch` is the samples of a global batch; `length` of the data need not divide by it."""

    task: str = "mlp"
    optimizer: Callable[[nn.Module], Optimizer] = adamw
    accumulation: int = 1
    batch: int = 8
    length: int = 40
    epochs: int = 1
    explicit: bool = False
    """Whether the loop says `with accelerator.accumulate(model)`, rather than leave it to the setting."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further settings of the `Accelerator`; nothing else reaches it from the environment."""

    def __str__(self) -> str:
        loop = "accumulate()" if self.explicit else "setting alone"
        return (
            f"{self.task}, {self.optimizer.__name__}, {self.length} samples, accumulation {self.accumulation} ({loop})"
        )


@dataclass(frozen=True)
class Trained:
    """The mean loss of each global batch, and the weights by name at the end."""

    losses: list[float]
    weights: dict[str, Tensor]


def train_plainly(run: Run, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Trained:
    """The run as a plain torch loop in this process alone, its forward passes in `dtype`; `settings` do not count."""
    task = TASKS[run.task]
    model = task.model().to(device)
    optimizer = run.optimizer(model)
    scale = LOSS_SCALE if dtype is torch.float16 else 1.0
    losses = []
    for _ in range(run.epochs):
        for window in _windows(DataLoader(task.data(run.length), run.batch), run.accumulation):
            for batch in window:
                loss = task.loss(_Autocast(model, dtype), {name: value.to(device) for name, value in batch.items()})
                (loss / len(window) * scale).backward()  # type: ignore[no-untyped-call]
                losses.append(loss.item())
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= scale
            optimizer.step()
            optimizer.zero_grad()
    return Trained(losses, {name: value.cpu() for name, value in model.state_dict().items()})


def train(run: Run) -> Trained:
    """The run under accel; all ranks. The global batch is cut into equal parts, so `batch` must divide."""
    accelerator, model, optimizer, loader = prepare(run)
    losses = [loss for _ in range(run.epochs) for loss in epoch(run, accelerator, model, optimizer, loader)]
    weights = accelerator.get_state_dict(model)
    accelerator.free_memory()
    return Trained(losses, weights)


def prepare(run: Run) -> tuple[Accelerator, nn.Module, Optimizer, Any]:
    """An `Accelerator` and the run's prepared model, optimizer and loader; all ranks."""
    size = World.from_environment().size
    config = Config(num_processes=size, gradient_accumulation_steps=run.accumulation)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is emulated on this")  # slow, which tiny models do not mind
        accelerator = Accelerator(config, **run.settings)
    task = TASKS[run.task]
    model = task.model()
    loader = DataLoader(task.data(run.length), run.batch // accelerator.mesh.axis(Axis.DATA).size)
    return accelerator, *accelerator.prepare(model, run.optimizer(model), loader)


def epoch(run: Run, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, loader: Any) -> list[float]:
    """What is left of an epoch; returns the mean loss of each global batch. All ranks."""
    losses = []
    for batch in loader:
        with accelerator.accumulate(model) if run.explicit else nullcontext():
            loss = TASKS[run.task].loss(model, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach() * loader.weight, reduction="mean").item())
    return losses


def tolerance(dtype: torch.dtype) -> float:
    """How far a `deviation` may come from adding up in another order, which groups samples by process.

    A few units of float32; of a narrower dtype one unit, since its sums are of values rounded to it.
    """
    return 16 * torch.finfo(dtype).eps if dtype is torch.float32 else torch.finfo(dtype).eps


def deviation(found: Trained, expected: Trained) -> float:
    """The largest relative difference of a loss, or of a tensor in the largest element of either; inf if not alike."""
    if len(found.losses) != len(expected.losses) or found.weights.keys() != expected.weights.keys():
        return float("inf")
    pairs = [(torch.tensor(a), torch.tensor(b)) for a, b in zip(found.losses, expected.losses, strict=True)]
    pairs += [(found.weights[name], expected.weights[name]) for name in expected.weights]
    return max(_deviation(a.double(), b.double()) for a, b in pairs)


def _deviation(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    difference = (found - expected).abs().max().item()
    return difference / max(expected.abs().max().item(), 1e-30) if difference == difference else float("inf")


def _windows(loader: DataLoader[Any], length: int) -> Iterator[list[Any]]:
    """The batches of an epoch in lists of `length`; the last list may be shorter."""
    batches = iter(loader)
    while window := list(islice(batches, length)):
        yield window


class _Autocast(nn.Module):
    """A model whose forward pass computes in a dtype and returns float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, *inputs: Tensor) -> Any:
        with torch.autocast(inputs[0].device.type, self.dtype, enabled=self.dtype is not torch.float32):
            return _to_float32(self.model(*inputs))


def _to_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float()
    if isinstance(value, dict):
        return {key: _to_float32(item) for key, item in value.items()}
    return tuple(_to_float32(item) for item in value)
