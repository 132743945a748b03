"""Several axes at once give what a plain one-process loop gives, and any layout loads what any other saved.

Each row is a layout of processes for the same transformer; the reference uses nothing of accel.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel.testing import run
from accel.testing.training import Run, Trained, adamw, deviation, prepare, train_plainly
from accel.testing.training import epoch as train_epoch

PIPELINE, TENSOR, CONTEXT = {"size": 2, "micro_batches": 2}, {"size": 2}, {"size": 2}
DIVIDED = {**TENSOR, "sequence_parallel": True, "loss_parallel": True}

LAYOUTS: dict[str, tuple[int, Any]] = {
    "tensor x ddp": (4, {"tensor": TENSOR, "ddp": {}}),
    "tensor x zero3": (4, {"tensor": DIVIDED, "zero3": {"minimum_size": 0}}),
    "context x zero3": (4, {"context": CONTEXT, "zero3": {"minimum_size": 0}}),
    "pipeline x ddp": (4, {"pipeline": PIPELINE, "ddp": {}}),
    "pipeline x zero1": (4, {"pipeline": {**PIPELINE, "outputs": "last"}, "zero1": {"minimum_size": 0}}),
    "pipeline x zero2": (4, {"pipeline": PIPELINE, "zero2": {"minimum_size": 0}}),
    "pipeline x zero3": (4, {"pipeline": PIPELINE, "zero3": {"minimum_size": 0}}),
    "pipeline x tensor": (4, {"pipeline": {**PIPELINE, "outputs": "last"}, "tensor": TENSOR}),
    "3d with ddp": (8, {"pipeline": PIPELINE, "tensor": TENSOR, "ddp": {}}),
    "3d with zero1": (8, {"pipeline": PIPELINE, "tensor": TENSOR, "zero1": {"minimum_size": 0}}),
    "3d with zero3": (8, {"pipeline": PIPELINE, "tensor": DIVIDED, "zero3": {"minimum_size": 0}}),
    "pipeline x hsdp": (8, {"pipeline": PIPELINE, "zero3": {"replicas": 2, "minimum_size": 0}}),
    "tensor x hsdp": (8, {"tensor": TENSOR, "zero3": {"replicas": 2, "minimum_size": 0}}),
}
"""Processes, and the setting `strategies`."""

SETTINGS = {
    "fp32": {"mixed_precision": "fp32"},
    "bf16": {"mixed_precision": "bf16"},
    "fp16": {"mixed_precision": {"fp16": {"initial_scale": 1024}}},
}
TASK = Run("transformer", adamw, accumulation=2, length=37, explicit=True)
CLIP = 0.5


@functools.cache
def reference(precision: str) -> tuple[Trained, list[float]]:
    [found] = run(1, plainly, getattr(torch, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision]))
    return found


def plainly(dtype: torch.dtype) -> tuple[Trained, list[float]]:
    """The run by plain torch, with clipping; and the norms."""
    norms: list[float] = []

    def clipped(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = adamw(model)
        optimizer.register_step_pre_hook(
            lambda *unused: norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        )
        return optimizer

    return train_plainly(replace(TASK, optimizer=clipped), dtype), norms


def train(strategies: Any, settings: dict[str, Any]) -> tuple[Trained, list[float]]:
    """The same under accel; all ranks."""
    accelerator, model, optimizer, loader = prepare(under(strategies, settings))
    norms: list[float] = []
    step = optimizer.step

    def clip_and_step() -> None:
        if accelerator.sync_gradients:
            norms.append(accelerator.clip_grad_norm_(model.parameters(), CLIP).item())
        step()

    optimizer.step = clip_and_step  # type: ignore[assignment]
    losses = train_epoch(TASK, accelerator, model, optimizer, loader)
    return Trained(losses, accelerator.get_state_dict(model)), norms


def under(strategies: Any, settings: dict[str, Any]) -> Run:
    return replace(TASK, settings={"strategies": strategies, "device": "cpu", **settings})


def rows() -> list[Any]:
    """Every layout in float32; in bf16 the fast suite has those of three dimensions only."""
    slow = {"bf16": [layout for layout in LAYOUTS if not layout.startswith("3d")]}
    return [
        pytest.param(layout, precision, marks=[pytest.mark.slow] if layout in slow.get(precision, ()) else [])
        for precision in ("fp32", "bf16")
        for layout in LAYOUTS
    ]


@pytest.mark.parametrize(("layout", "precision"), rows())
def test_losses_norms_and_weights_are_those_of_a_plain_loop(layout: str, precision: str) -> None:
    processes, strategies = LAYOUTS[layout]
    expected, norms = reference(precision)
    allowed = 1e-5 if precision == "fp32" else 2 * torch.finfo(torch.bfloat16).eps
    for found, found_norms in run(processes, train, strategies, SETTINGS[precision], timeout=120):
        assert deviation(found, expected) <= allowed
        assert found_norms == pytest.approx(norms, rel=100 * allowed if precision == "bf16" else 1e-4)


def save(strategies: Any, folder: Path) -> dict[str, torch.Tensor]:
    accelerator, model, optimizer, loader = prepare(under(strategies, {}))
    train_epoch(TASK, accelerator, model, optimizer, loader)
    accelerator.save_state(folder)
    return accelerator.get_state_dict(model)


def load(strategies: Any, folder: Path) -> tuple[dict[str, torch.Tensor], Trained]:
    accelerator, model, optimizer, loader = prepare(under(strategies, {}))
    accelerator.load_state(folder)
    loaded = accelerator.get_state_dict(model)
    losses = train_epoch(TASK, accelerator, model, optimizer, loader)
    return loaded, Trained(losses, accelerator.get_state_dict(model))


CHAIN = ["3d with zero3", "single", "pipeline x zero2", "tensor x zero3", "3d with ddp"]


@pytest.mark.parametrize(("saver", "loader"), list(itertools.pairwise(CHAIN)), ids=str)
def test_any_layout_goes_on_from_any_other(saver: str, loader: str, tmp_path: Path) -> None:
    layouts = {**LAYOUTS, "single": (1, "single")}
    saved = run(layouts[saver][0], save, layouts[saver][1], tmp_path / "checkpoint", timeout=120)[0]
    [expected] = run(1, plainly_twice)
    for loaded, found in run(layouts[loader][0], load, layouts[loader][1], tmp_path / "checkpoint", timeout=120):
        assert all(torch.equal(loaded[name], value) for name, value in saved.items())
        assert deviation(found, expected) <= 1e-5


def plainly_twice() -> Trained:
    found = train_plainly(replace(TASK, epochs=2))
    return Trained(found.losses[len(found.losses) // 2 :], found.weights)
