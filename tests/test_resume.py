"""Exact resume: over the runs, each sample is trained on once, in the order of the run that did not stop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader, Dataset

from accel import Accelerator, CheckpointError
from accel.testing import run

SAMPLES, BATCH, EPOCHS = 44, 4, 2
GLOBAL_BATCHES = SAMPLES // BATCH


class Numbered(Dataset[tuple[int, Tensor]]):
    """Samples that know their number; remembers which were asked for."""

    def __init__(self) -> None:
        self.values = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(1))
        self.asked: list[int] = []

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        self.asked.append(index)
        return index, self.values[index]


class Run:
    """A training that can stop after any micro-batch, and what it did: (epoch, sample ids), losses, weights."""

    def __init__(
        self, folder: Path, workers: int = 0, steps: int = 1, evaluates: bool = False, **settings: Any
    ) -> None:
        torch.manual_seed(0)
        self.folder, self.evaluates = folder, evaluates
        self.accelerator = Accelerator(
            device="cpu", split_batches=True, gradient_accumulation_steps=steps, project_dir=str(folder), **settings
        )
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = MultiStepLR(self.optimizer, [3, 5], 0.5)
        self.dataset = Numbered()
        loaders = [DataLoader(self.dataset, BATCH, shuffle=True, num_workers=workers), DataLoader(Numbered(), 8)]
        self.loader, self.test = self.accelerator.prepare(*loaders)
        self.accelerator.prepare(self.model, self.optimizer, self.scheduler)
        self.ledger: list[tuple[int, list[int]]] = []
        self.losses: list[float] = []

    def train(self, start: int, stop_after: int | None = None, explicit: bool = False) -> dict[str, Any]:
        """Train to the end, or save and stop after so many micro-batches."""
        for epoch in range(start, EPOCHS):
            for ids, x in self.batches(epoch):
                self.step(ids, x, epoch, explicit)
                if len(self.losses) == stop_after:
                    self.accelerator.save_state(self.folder / "checkpoint")
                    return self.result()
            self.evaluate()
        return self.result()

    def batches(self, epoch: int) -> Iterator[Any]:
        """How the loop asks for an epoch's batches; other libraries' users do it in other ways."""
        return iter(self.loader)

    def step(self, ids: Tensor, x: Tensor, epoch: int, explicit: bool) -> None:
        together = self.accelerator.gather_for_metrics(ids).tolist()
        if explicit:
            with self.accelerator.accumulate(self.model):
                self.backward(x)
        else:
            self.backward(x)
        self.ledger.append((epoch, together))
        consumed = epoch * SAMPLES + self.loader.state_dict()["samples"][0]
        if self.evaluates and consumed // BATCH % 3 == 1:
            self.evaluate()

    def backward(self, x: Tensor) -> None:
        loss = self.model(x).square().mean()
        self.accelerator.backward(loss)
        self.optimizer.step(), self.scheduler.step(), self.optimizer.zero_grad()
        self.losses.append(self.accelerator.reduce(loss.detach(), "mean").item())

    def evaluate(self) -> None:
        found = [i for ids, x in self.test for i in self.accelerator.gather_for_metrics(ids).tolist()]
        assert found == list(range(SAMPLES)), "an evaluation is of all samples, once"
        torch.rand(1)  # may draw, too

    def result(self) -> dict[str, Any]:
        return {"ledger": self.ledger, "losses": self.losses, "weights": self.model[0].weight.detach()}


def whole(folder: Path, settings: dict[str, Any], explicit: bool = False) -> dict[str, Any]:
    return Run(folder, **settings).train(0, explicit=explicit)


def first(folder: Path, settings: dict[str, Any], stop: int, explicit: bool = False) -> dict[str, Any]:
    return Run(folder, **settings).train(0, stop, explicit)


def second(folder: Path, settings: dict[str, Any], explicit: bool = False, again: int | None = None) -> dict[str, Any]:
    going_on = Run(folder, **settings)
    going_on.accelerator.load_state(folder / "checkpoint")
    return going_on.train(going_on.loader.epoch, again, explicit)


def check(results: list[dict[str, Any]], reference: dict[str, Any], bitwise: bool, window: int = 1) -> None:
    """What the runs did, up to their checkpoints, is what the run that did not stop did."""
    ledger, losses = [], []
    for result in results[:-1]:
        kept = kept_of(len(ledger) + len(result["ledger"]), window) - len(ledger)
        ledger += result["ledger"][:kept]
        losses += result["losses"][:kept]
    assert ledger + results[-1]["ledger"] == reference["ledger"]
    if bitwise:
        assert losses + results[-1]["losses"] == reference["losses"]
        assert torch.equal(results[-1]["weights"], reference["weights"])
    else:
        torch.testing.assert_close(losses + results[-1]["losses"], reference["losses"])


def kept_of(batches: int, window: int) -> int:
    """Micro-batches whose gradients are in the weights: whole windows, of which the epoch's last may be shorter."""
    epochs, rest = divmod(batches, GLOBAL_BATCHES)
    return epochs * GLOBAL_BATCHES + rest // window * window


def stories(folder: Path, settings: dict[str, Any], stops: list[int], explicit: bool = False) -> list[Any]:
    """A run that does not stop, and for each stop one that does, with the one that goes on from there."""
    reference = whole(folder, settings, explicit)
    return [(reference, [first(folder, settings, n, explicit), second(folder, settings, explicit)]) for n in stops]


@pytest.mark.parametrize("settings", [{}, {"workers": 2}, {"evaluates": True}], ids=lambda s: ",".join(s) or "plain")
def test_the_same_layout_goes_on_bitwise(tmp_path: Path, settings: dict[str, Any]) -> None:
    for reference, results in run(2, stories, tmp_path, settings, [5, GLOBAL_BATCHES, 17])[0]:
        assert [epoch for epoch, _ in reference["ledger"]] == [0] * GLOBAL_BATCHES + [1] * GLOBAL_BATCHES
        check(results, reference, bitwise=True)


@pytest.mark.parametrize("explicit", [False, True], ids=["implicit", "explicit"])
@pytest.mark.parametrize("evaluates", [False, True], ids=["", "evaluates"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_window_cut_in_the_middle_begins_again(tmp_path: Path, size: int, explicit: bool, evaluates: bool) -> None:
    """With a window of three, an epoch of eleven ends with a shorter one; dropout, evaluation and all."""
    settings = {"steps": 3, "evaluates": evaluates}
    stops = [3, 4, 5, 6, 10, 11, 12, 14] if size == 1 else [5, 12]
    for reference, results in run(size, stories, tmp_path, settings, stops, explicit)[0]:
        check(results, reference, bitwise=True, window=3)


@pytest.mark.parametrize("sizes", [(2, 1, 3), (1, 3, 2)])
@pytest.mark.parametrize("workers", [0, 2])
def test_another_number_of_processes_sees_the_same_batches(
    tmp_path: Path, sizes: tuple[int, ...], workers: int
) -> None:
    settings = {"workers": workers, "steps": 2, "evaluates": True}
    (reference,) = run(1, whole, tmp_path / "whole", {"steps": 2})
    results = [run(sizes[0], first, tmp_path, settings, 5)[0]]
    results.append(run(sizes[1], second, tmp_path, settings, False, 8)[0])
    results.append(run(sizes[2], second, tmp_path, settings)[0])
    ledger: list[Any] = []
    for result, kept in zip(results, (4, 7, None), strict=True):
        ledger += result["ledger"][:kept]
    assert ledger == reference["ledger"]


class SetsEpoch(Run):
    """Tells the loader the epoch, as for a distributed sampler."""

    def batches(self, epoch: int) -> Iterator[Any]:
        self.loader.set_epoch(epoch)
        return iter(self.loader)


class Skips(SetsEpoch):
    """Also leaves out by hand what was done of the first epoch."""

    skip = 0

    def batches(self, epoch: int) -> Iterator[Any]:
        self.loader.set_epoch(epoch)
        skip, self.skip = self.skip, 0
        return iter(self.accelerator.skip_first_batches(self.loader, skip) if skip else self.loader)


def habits(folder: Path, kind: type[Run], stop: int) -> tuple[Any, Any]:
    reference = whole(folder, {})
    begun, ended = kind(folder).train(0, stop), kind(folder)
    ended.accelerator.load_state(folder / "checkpoint")
    ended.skip = stop % GLOBAL_BATCHES  # type: ignore[attr-defined]
    return reference, [begun, ended.train(stop // GLOBAL_BATCHES)]


@pytest.mark.parametrize("kind", [SetsEpoch, Skips])
@pytest.mark.parametrize("stop", [5, 17])
def test_what_users_of_other_libraries_write_does_no_harm(tmp_path: Path, kind: type[Run], stop: int) -> None:
    ((reference, results),) = run(1, habits, tmp_path, kind, stop)
    check(results, reference, bitwise=True)


def asked_after_resuming(folder: Path, stop: int) -> tuple[list[int], list[int]]:
    begun, going_on = Run(folder), Run(folder)
    begun.train(0, stop)
    going_on.accelerator.load_state(folder / "checkpoint")
    before = list(going_on.dataset.asked)
    list(going_on.loader)
    return before, going_on.dataset.asked


@pytest.mark.parametrize("stop", [1, 10])
def test_nothing_is_read_of_what_is_left_out(tmp_path: Path, stop: int) -> None:
    ((before, asked),) = run(1, asked_after_resuming, tmp_path, stop)
    assert (before, len(asked)) == ([], SAMPLES - stop * BATCH)


def two_loaders(folder: Path, stop: int | None, resume: bool) -> list[tuple[list[int], list[int]]]:
    """Trains on pairs of batches, with windows of two."""
    accelerator = Accelerator(device="cpu", gradient_accumulation_steps=2)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    left, right = (DataLoader(Numbered(), 4, shuffle=True, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    model, optimizer, left, right = accelerator.prepare(model, optimizer, left, right)
    if resume:
        accelerator.load_state(folder)
    ledger = []
    for (a, x), (b, y) in zip(left, right, strict=True):
        accelerator.backward(model(x + y).square().mean())
        optimizer.step(), optimizer.zero_grad()
        ledger.append((a.tolist(), b.tolist()))
        if len(ledger) == stop:
            accelerator.save_state(folder)
            break
    return ledger


@pytest.mark.parametrize("stop", [4, 5])
def test_loaders_that_are_read_in_pairs_stay_pairs(tmp_path: Path, stop: int) -> None:
    """Amid a window the first of them is a batch further when the second is asked."""
    reference = two_loaders(tmp_path / "whole", None, False)
    begun = two_loaders(tmp_path / "c", stop, False)
    assert begun[:4] + two_loaders(tmp_path / "c", None, True) == reference


def test_loading_forgets_a_started_window(tmp_path: Path) -> None:
    accelerator = Accelerator(device="cpu", gradient_accumulation_steps=2)
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accelerator.prepare(model, optimizer)
    accelerator.save_state(tmp_path / "c")
    before = model.weight.detach().clone()
    accelerator.backward(100 * model(torch.ones(1, 1)).sum())
    optimizer.step()
    accelerator.load_state(tmp_path / "c")
    assert model.weight.grad is None
    for _ in range(2):
        accelerator.backward(model(torch.ones(1, 1)).sum())
        optimizer.step()
    assert torch.equal(model.weight, before - 1)


# -- the newest of the run's own folder -------------------------------------------------------------------------------


def test_resume_takes_the_newest_and_begins_where_there_is_none(tmp_path: Path) -> None:
    accelerator = Accelerator(device="cpu", project_dir=str(tmp_path))
    model = accelerator.prepare(nn.Linear(1, 1))
    assert not accelerator.resume()
    for number in (2, 10):
        nn.init.constant_(model.weight, number)
        accelerator.save_state(tmp_path / "checkpoints" / f"checkpoint_{number}")
    (tmp_path / "checkpoints" / ".checkpoint_11.writing").mkdir()
    assert accelerator.resume()
    assert model.weight.item() == 10


def test_a_damaged_checkpoint_is_no_reason_to_begin_again(tmp_path: Path) -> None:
    accelerator = Accelerator(device="cpu", project_dir=str(tmp_path))
    accelerator.prepare(nn.Linear(1, 1))
    (tmp_path / "checkpoints" / "checkpoint_0").mkdir(parents=True)
    with (
        pytest.warns(UserWarning, match="passed over") as caught,
        pytest.raises(CheckpointError, match="no complete checkpoint"),
    ):
        accelerator.resume()
    assert [warning.filename for warning in caught] == [__file__]  # and not where resume() calls load_state()
