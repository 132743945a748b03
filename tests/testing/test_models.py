"""The tiny models: the same from the same seed, and each with what it is there for."""

from __future__ import annotations

import pytest
import torch

from accel.testing.models import TASKS, Branches, Task


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_models_and_data_are_functions_of_the_seed(task: Task) -> None:
    before = torch.random.get_rng_state()
    first, again, other = task.model(), task.model(), task.model(seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    few, many = task.data(3).fields, task.data(7).fields
    assert all(torch.equal(few[name], many[name][:3]) for name in many)
    assert len({tuple(row.flatten().tolist()) for row in next(iter(many.values()))}) == 7


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_loss_is_a_mean_over_samples(task: Task) -> None:
    model, batch = task.model().eval(), task.data(8).fields
    halves = [
        task.loss(model, {name: values[part] for name, values in batch.items()}) for part in (slice(4), slice(4, 8))
    ]
    torch.testing.assert_close(task.loss(model, batch), sum(halves) / 2)


def test_tied_weights_are_one_parameter() -> None:
    model = TASKS["tied weights"].model()
    assert model.get_parameter("head.weight") is model.get_parameter("embedding.weight")


def test_frozen_layers_do_not_train() -> None:
    trains = [parameter.requires_grad for parameter in TASKS["frozen layers"].model().parameters()]
    assert trains == [False, False, True, True]


def test_some_batches_use_the_branch_and_some_do_not() -> None:
    task, used = TASKS["unused parameters"], []
    for start in range(0, 40, 2):
        model = task.model()
        assert isinstance(model, Branches)
        task.loss(model, {name: values[start : start + 2] for name, values in task.data(40).fields.items()}).backward()
        used.append(model.branch.weight.grad is not None)
        assert model.unused.weight.grad is None and model.trunk.head.weight.grad is not None
    assert any(used) and not all(used)
