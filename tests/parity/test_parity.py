"""A prepared loop gives what a plain one-process torch loop gives: every strategy, precision and number of processes.

The reference uses nothing of accel and takes the whole global batch at once. On one process the bits must agree. On
several, samples are added up in another order: float32 sums then differ by a few units (1e-6 relative is allowed).
bf16 and fp16 round each process's partial sums of gradients to their own width before they are averaged in
float32, so weights may differ by one unit of that width (2^-7, 2^-10) relative to the largest of a tensor.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from accel import registry
from accel.config import Config
from accel.errors import ConfigError
from accel.interfaces import Axis
from accel.plan import Plan
from accel.testing import run
from accel.testing.training import Run, Trained, adamw, deviation, sgd, train, train_plainly, two_groups

PRECISIONS: dict[str, tuple[Any, torch.dtype, float]] = {
    "fp32": ("fp32", torch.float32, 1e-6),
    "bf16": ("bf16", torch.bfloat16, torch.finfo(torch.bfloat16).eps),
    "fp16": ({"fp16": {"initial_scale": 1024}}, torch.float16, torch.finfo(torch.float16).eps),
}
"""Each setting, the dtype of the plain loop's autocast, and the deviation allowed. torch's first loss scale, 65536,
overflows on smaller batches and not on larger ones: it would skip a step on n processes and none in the reference."""

RECIPES = [
    ("mlp", adamw),
    ("mlp", sgd),
    ("mlp", two_groups),
    ("tied weights", adamw),
    ("frozen layers", sgd),
    ("unused parameters", adamw),
    ("unused parameters", sgd),
    ("several outputs", two_groups),
]

LOOPS = [
    {"accumulation": 1, "length": 32},
    {"accumulation": 1, "length": 37},  # the last batch is 5 of 8 samples
    {"accumulation": 3, "length": 48, "explicit": True},
    {"accumulation": 3, "length": 40, "explicit": True},  # the last window is 2 batches
    {"accumulation": 3, "length": 37},  # both, by the setting alone
    {"accumulation": 3, "length": 40, "epochs": 2},
]

RUNS = [Run(task, optimizer, **loop) for (task, optimizer), loop in product(RECIPES, LOOPS)]


@functools.cache
def references(precision: str) -> list[Trained]:
    [found] = run(1, train_all_plainly, PRECISIONS[precision][1])
    return found


def train_all_plainly(dtype: torch.dtype) -> list[Trained]:
    return [train_plainly(run, dtype) for run in RUNS]


def train_all(runs: list[Run]) -> list[Trained]:
    return [train(run) for run in runs]


def combinations() -> list[Any]:
    """Each strategy that fills the data axis by itself, with the numbers of processes that it takes."""
    found = []
    for strategy, precision, n in product(registry.names("strategy"), PRECISIONS, (1, 2, 4)):
        if registry.load("strategy", strategy).axis is not Axis.DATA:
            continue  # they have parity tests of their own, with models that they divide
        try:
            Plan.of(Config().replace(strategies=strategy, num_processes=n))
        except ConfigError:
            continue
        marks = [pytest.mark.slow] if n > 2 and precision != "fp32" else []  # what they add is little, for a minute
        found.append(pytest.param(strategy, precision, n, id=f"{strategy}-{precision}-{n}", marks=marks))
    return found


@pytest.mark.parametrize(("strategy", "precision", "n"), combinations())
def test_losses_and_weights_are_those_of_a_plain_loop(strategy: str, precision: str, n: int) -> None:
    setting, _, tolerance = PRECISIONS[precision]
    runs = [
        replace(run, settings={"strategies": strategy, "mixed_precision": setting, "device": "cpu"}) for run in RUNS
    ]
    allowed = 0.0 if n == 1 else tolerance
    wrong = [
        f"{run}, rank {rank}: {deviation(found, expected):.1e}"
        for rank, results in enumerate(run_on(n, runs))
        for run, found, expected in zip(runs, results, references(precision), strict=True)
        if deviation(found, expected) > allowed
    ]
    assert wrong == [], f"allowed is {allowed:.1e}"


def run_on(n: int, runs: list[Run]) -> list[list[Trained]]:
    return run(n, train_all, runs, timeout=100)


def test_reference_and_deviation_tell_runs_apart() -> None:
    """What parity rests on: runs that should differ do, and by more than any tolerance here."""
    [results] = run(1, train_all_plainly, torch.float32)
    assert all(deviation(result, result) == 0 for result in results)
    assert len({tuple(result.losses) for result in results}) == len(results)
    shorter = replace(results[0], losses=results[0].losses[:-1])
    assert deviation(shorter, results[0]) == float("inf")
    moved = replace(results[0], weights={name: value * (1 + 1e-5) for name, value in results[0].weights.items()})
    assert 9e-6 < deviation(moved, results[0]) < 2e-5


def test_training_moves_weights_far_beyond_the_tolerance() -> None:
    [[start, trained]] = run(1, train_two, Run(length=8), Run(length=37))
    assert deviation(replace(trained, losses=start.losses), start) > 0.01


def train_two(*runs: Run) -> list[Trained]:
    return [train_plainly(run) for run in runs]
