"""What a strategy promises: it changes where things are computed, and nothing of what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ... import registry
from ...errors import ConfigError, PrepareError
from .. import training
from ..training import Run, Trained
from .case import Case, Skip

RUNS = (
    Run("mlp", training.adamw, length=36),
    Run("tied weights", training.sgd, accumulation=2, length=40),
    Run("frozen layers", training.two_groups),
    Run("unused parameters", training.sgd, accumulation=3, explicit=True),
)
"""With 36 samples the last batch is uneven; with 5 batches the last window of 2 or 3 is cut short."""


def trains_as_one_process_does(case: Case) -> None:
    """Losses and weights are those of one process: of a plain torch loop, or without a strategy in other precisions."""
    for precision, size in _allowed(case):
        dtype = getattr(torch, registry.load("precision", precision).dtype)
        expected = _expected(case, precision, dtype)
        runs = [replace(run, settings=_settings(case, precision)) for run in RUNS]
        for rank, results in enumerate(case.run(size, _train, runs)):
            for run, found, wanted in zip(runs, results, expected, strict=True):
                _compare(found, wanted, dtype, f"{run}, {precision}, rank {rank} of {size}")


def repeats_bitwise(case: Case) -> None:
    """The same run twice gives the same bits on every rank."""
    size = max(size for _, size in _allowed(case, "fp32"))
    runs = [replace(run, settings=_settings(case, "fp32")) for run in RUNS[:2]]
    first, second = case.run(size, _train, runs), case.run(size, _train, runs)
    for one, other in zip(first, second, strict=True):
        for run, a, b in zip(runs, one, other, strict=True):
            assert training.deviation(a, b) == 0, f"{run} on {size} processes"


def saves_on_n_and_loads_on_m(case: Case) -> None:
    """A run that is saved on n processes goes on, on m, to the weights of a plain torch loop that never stopped."""
    run = Run("mlp", training.adamw, length=36, epochs=2, settings=_settings(case, "fp32"))
    sizes = sorted({size for _, size in _allowed(case, "fp32")})
    [[expected]] = case.run(1, _train_plainly, [run], torch.float32, case.device_type)
    for saved in sizes:
        for loaded in sizes:
            with TemporaryDirectory() as folder:
                case.run(saved, _first_epoch, run, f"{folder}/state")
                for rank, found in enumerate(case.run(loaded, _last_epoch, run, f"{folder}/state")):
                    wanted = Trained(expected.losses[len(found.losses) :], expected.weights)
                    _compare(found, wanted, torch.float32, f"saved on {saved}, loaded on {loaded}, rank {rank}")


CONTRACTS = (trains_as_one_process_does, repeats_bitwise, saves_on_n_and_loads_on_m)


def _compare(found: Trained, wanted: Trained, dtype: torch.dtype, what: str) -> None:
    deviation, allowed = training.deviation(found, wanted), training.tolerance(dtype)
    assert deviation <= allowed, f"{what}: {deviation:.1e} from one process, allowed {allowed:.1e}"


def _expected(case: Case, precision: str, dtype: torch.dtype) -> list[Trained]:
    """What one process gives; how a narrow precision computes is its own affair, and its own contracts'."""
    if dtype is torch.float32:
        return case.run(1, _train_plainly, RUNS, dtype, case.device_type)[0]
    alone = {"strategies": (), "mixed_precision": precision, "device": case.device}
    return case.run(1, _train, [replace(run, settings=alone) for run in RUNS])[0]


def _settings(case: Case, precision: str) -> dict[str, Any]:
    return {"strategies": (case.choice,), "mixed_precision": precision, "device": case.device}


def _allowed(case: Case, only: str | None = None) -> Iterator[tuple[str, int]]:
    """Each precision and number of processes that the strategy does not refuse; raises Skip if it refuses all."""
    refusals = []
    found = False
    for precision in [only] if only else registry.names("precision"):
        for size in case.sizes:
            refusal = case.run(size, _refusal, Run(settings=_settings(case, precision)))[0]
            if refusal is None:
                found = True
                yield precision, size
            else:
                refusals.append(refusal)
    if not found:
        raise Skip(f"refuses: {refusals[0]}")


def _refusal(run: Run) -> str | None:
    """Why the strategy will not train with these settings on this many processes; None if it will."""
    try:
        training.prepare(run)
    except (ConfigError, PrepareError) as error:
        return str(error)
    return None


def _train(runs: list[Run]) -> list[Trained]:
    return [training.train(run) for run in runs]


def _train_plainly(runs: list[Run], dtype: torch.dtype, device: str) -> list[Trained]:
    return [training.train_plainly(run, dtype, device) for run in runs]


def _first_epoch(run: Run, folder: str) -> None:
    accelerator, *prepared = training.prepare(run)
    training.epoch(run, accelerator, *prepared)
    accelerator.save_state(folder)


def _last_epoch(run: Run, folder: str) -> Trained:
    accelerator, model, optimizer, loader = training.prepare(run)
    assert Path(folder).is_dir()
    accelerator.load_state(folder)
    losses = training.epoch(run, accelerator, model, optimizer, loader)
    return Trained(losses, accelerator.get_state_dict(model))
