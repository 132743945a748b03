"""What a precision promises: gradients as good as its dtype, float32 for the loop, and no step from an overflow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import training
from ..models import TASKS
from ..training import Run
from .case import Case, Skip

SAMPLES = 32


def gradients_are_within_its_tolerance(case: Case) -> None:
    """Gradients differ from those in float32 by a few units of the precision's dtype, relative to their norm."""
    dtype = getattr(torch, case.plugin.dtype)
    allowed = 8 * torch.finfo(dtype).eps
    for task in ("mlp", "tied weights", "several outputs"):
        [deviation] = case.run(1, _gradient_deviation, task, _settings(case), case.device_type)
        assert deviation <= allowed, f"{task}: {deviation:.1e} from float32's, allowed {allowed:.1e}"


def computes_in_its_dtype(case: Case) -> None:
    """Layers inside really compute in the dtype that the precision names."""
    dtype = getattr(torch, case.plugin.dtype)
    if dtype.itemsize < 2:
        raise Skip(f"{dtype} is not a dtype that layers return")
    [found] = case.run(1, _inner_dtype, _settings(case))
    assert found is dtype, f"a linear layer returned {found}, the precision names {dtype}"


def loop_sees_float32(case: Case) -> None:
    """Outputs of the model, gradients and parameters are float32 for the loop and for the optimizer."""
    [found] = case.run(1, _outer_dtypes, _settings(case))
    wrong = {name: dtype for name, dtype in found.items() if dtype is not torch.float32}
    assert not wrong, f"expected torch.float32: {wrong}"


def overflow_skips_the_step_on_every_rank(case: Case) -> None:
    """One rank's gradients overflow: no rank steps, each says so, the schedule waits, and the next step is taken."""
    if not case.plugin.scales_loss:
        raise Skip("does not scale the loss, so it skips no step")
    for size in case.sizes:
        for overflowing in {0, size - 1}:
            where = f"rank {overflowing} of {size} overflows"
            results = case.run(size, _overflow, _settings(case), overflowing)
            assert [skipped for skipped, _, _ in results] == [(True, False)] * size, f"{where}: skipped {results}"
            assert all(kept for _, kept, _ in results), f"{where}: parameters or learning rate changed"
            assert all(moved for _, _, moved in results), f"{where}: the next step changed nothing"


def state_survives_a_checkpoint(case: Case) -> None:
    """What `state_dict` returns is taken over by `load_state_dict`."""
    [(saved, loaded)] = case.run(1, _reload, _settings(case))
    assert saved == loaded


CONTRACTS = (
    gradients_are_within_its_tolerance,
    computes_in_its_dtype,
    loop_sees_float32,
    overflow_skips_the_step_on_every_rank,
    state_survives_a_checkpoint,
)


def _settings(case: Case) -> dict[str, Any]:
    return {"mixed_precision": case.choice, "device": case.device}


def _gradient_deviation(task: str, settings: dict[str, Any], device: str) -> float:
    batch = TASKS[task].data(SAMPLES).fields
    expected = TASKS[task].model().to(device)
    TASKS[task].loss(expected, {name: value.to(device) for name, value in batch.items()}).backward()  # type: ignore[no-untyped-call]
    accelerator, model, optimizer, _ = training.prepare(Run(task, training.sgd, settings=settings))
    moved = {name: value.to(accelerator.device) for name, value in batch.items()}
    accelerator.backward(TASKS[task].loss(model, moved))
    accelerator.unscale_gradients(optimizer)
    return _distance(model, expected)


def _distance(model: nn.Module, expected: nn.Module) -> float:
    """The norm of the difference of all gradients, relative to the expected ones'."""
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), expected.parameters(), strict=True)]
    found = torch.cat([p.flatten() for p, _ in pairs if p is not None])
    wanted = torch.cat([q.flatten() for _, q in pairs if q is not None])
    return float((found - wanted).norm() / wanted.norm())


def _inner_dtype(settings: dict[str, Any]) -> torch.dtype:
    _, model, _, loader = training.prepare(Run(settings=settings))
    seen: list[torch.dtype] = []
    hook = model.get_submodule("hidden").register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    model(next(iter(loader))["x"])
    hook.remove()
    return seen[0]


def _outer_dtypes(settings: dict[str, Any]) -> dict[str, torch.dtype]:
    accelerator, model, optimizer, loader = training.prepare(Run(settings=settings))
    output: Tensor = model(next(iter(loader))["x"])
    accelerator.backward(output.square().mean())
    optimizer.step()
    gradients = {f"gradient of {name}": p.grad.dtype for name, p in model.named_parameters() if p.grad is not None}
    parameters = {f"parameter {name}": p.dtype for name, p in model.named_parameters()}
    return {"output": output.dtype, **gradients, **parameters}


def _overflow(settings: dict[str, Any], overflowing: int) -> tuple[tuple[bool, bool], bool, bool]:
    """Whether the first and second step were skipped, whether the first changed nothing, and the second something."""
    accelerator, model, optimizer, loader = training.prepare(Run(settings=settings))
    schedule = accelerator.prepare(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    states, skipped = [_state(model, schedule)], []
    for step, batch in zip(range(2), loader, strict=False):
        loss = TASKS["mlp"].loss(model, batch)
        factor = float("inf") if step == 0 and accelerator.process_index == overflowing else 1.0
        accelerator.backward(loss * factor)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        skipped.append(accelerator.optimizer_step_was_skipped)
        states.append(_state(model, schedule))
    return (skipped[0], skipped[1]), states[0] == states[1], states[1] != states[2]


def _state(model: nn.Module, schedule: Any) -> tuple[list[list[float]], list[float]]:
    return [parameter.detach().flatten().tolist() for parameter in model.parameters()], schedule.get_last_lr()


def _reload(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    run = Run(settings=settings)
    accelerator, *prepared = training.prepare(run)
    training.epoch(run, accelerator, *prepared)
    saved = accelerator.precision.state_dict()
    other, *_ = training.prepare(run)
    other.precision.load_state_dict(saved)
    return saved, other.precision.state_dict()
