"""Every kind of model in every layout of axes gives what one plain process gives, with an uneven last batch."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from accel import Accelerator
from accel.interfaces import Axis
from accel.runtime.shards import Elsewhere
from accel.testing import run
from accel.testing.models import Samples

from .grid_cases import BATCH, HUGGING_FACE, OWN, Case

SAMPLES = 37
PIPELINE, TENSOR = {"pipeline": {"size": 2, "micro_batches": 2}}, {"tensor": {"size": 2}}
ZERO: dict[str, Any] = {"minimum_size": 0}
DATA = {"ddp": {"ddp": {}}, **{name: {name: ZERO} for name in ("zero1", "zero2", "zero3")}}
HSDP = {"zero3": {**ZERO, "replicas": 2}}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2": (2, TENSOR),
    "tensor 4": (4, {"tensor": {"size": 4}}),
    "pipeline 2": (2, PIPELINE),
    "pipeline 4": (4, {"pipeline": {"size": 4, "micro_batches": 2}}),
    "pipeline x tensor": (4, PIPELINE | TENSOR),
    **{f"tensor x {name}": (4, TENSOR | data) for name, data in DATA.items()},
    **{f"pipeline x {name}": (4, PIPELINE | data) for name, data in DATA.items()},
    **{f"3d with {name}": (8, PIPELINE | TENSOR | data) for name, data in DATA.items()},
    "tensor x hsdp": (8, TENSOR | HSDP),
    "pipeline x hsdp": (8, PIPELINE | HSDP),
}
"""Processes, and the setting `strategies`."""


def made(case: Case) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model, alike each time, and its optimizer, with an eps above the rounding of gradients."""
    torch.manual_seed(0)
    model = case.make().train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)


def distance(found: Tensor, wanted: Tensor, floor: float = 0.0) -> float:
    """The largest difference, relative to the largest element."""
    whole = found.full_tensor() if isinstance(found, DTensor) else found
    return (whole - wanted).abs().max().item() / max(wanted.abs().max().item(), floor)


def train(case: Case, strategies: Any) -> float:
    """The largest distance from plain torch in this process: of losses, and of the last gradients and the weights."""
    warnings.filterwarnings("ignore", "pipeline: .* asks about its data")  # masks that hide nothing are left out
    accelerator = Accelerator(device="cpu", num_processes=int(os.environ["WORLD_SIZE"]), strategies=strategies)
    rows = [case.sample(index) for index in range(SAMPLES)]
    data = Samples({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
    share = BATCH // accelerator.mesh.axis(Axis.DATA).size
    (model, optimizer), (plain, expected), found = made(case), made(case), []
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, share))
    for batch, whole in zip(loader, DataLoader(data, BATCH), strict=True):
        optimizer.zero_grad(), expected.zero_grad()
        loss, wanted = case.loss(model, batch), case.loss(plain, whole)
        accelerator.backward(loss), wanted.backward()
        found.append(distance(accelerator.reduce(loss.detach() * loader.weight, "mean"), wanted.detach()))
        optimizer.step(), expected.step()
    originals = dict(plain.named_parameters())
    largest = max(p.grad.abs().max().item() for p in originals.values() if p.grad is not None)
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, Elsewhere):
            original = originals[name]
            assert (parameter.grad is None) == (original.grad is None), name
            found.append(distance(parameter.detach(), original.detach(), 1e-2))
            if parameter.grad is not None:
                found.append(distance(parameter.grad, original.grad, 1e-3 * largest))
    return max(found)


def train_all(family: str, strategies: Any) -> dict[str, float]:
    return {name: train(case, strategies) for name, case in FAMILIES[family].items()}


FAMILIES = {"own": OWN, "hugging face": HUGGING_FACE}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:tensor divides nothing")  # of the CNN
def test_all_models_in_all_layouts(layout: str, family: str) -> None:
    if family == "hugging face":
        pytest.importorskip("transformers")
    processes, strategies = LAYOUTS[layout]
    for rank, distances in enumerate(run(processes, train_all, family, strategies, timeout=570)):
        wrong = {name: found for name, found in distances.items() if not found <= 1e-5}
        assert wrong == {}, f"rank {rank}"
