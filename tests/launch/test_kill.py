"""Killed at any instant and resumed, a run trains on each sample once, in the order of the run that was not killed.

A run is killed several times at instants drawn from a seed, the k-th time that a process opens, renames or deletes
a file or begins a micro-batch, and each time started again; where only the samples are compared, with another strategy
on another number of processes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Launch
from .killed import BATCH, EPOCHS, SAMPLES, WINDOW

SCRIPT = Path(__file__).parent / "killed.py"
EVENTS = {"step": 10, "open": 16, "os.rename": 4, "os.mkdir": 2, "shutil.rmtree": 2, "os.remove": 6, "os.rmdir": 1}
"""What a kill may come at, and up to which occurrence; the last three are of rotation."""

Layout = tuple[int, str]

LAYOUTS = [(1, "single"), *((n, s) for n in (1, 2, 3) for s in ("ddp", "zero1", "zero2", "zero3"))]
"""Numbers of processes and strategies that a run may go on with."""

STEPS = EPOCHS * -(-(SAMPLES // BATCH) // WINDOW)


def order(draw: random.Random, processes: int) -> str:
    """Whom to kill, at what, on which rank, at which occurrence."""
    event = draw.choice(["step", *EVENTS])
    rank = draw.randrange(processes) if event == "step" else 0  # the main process writes
    delay = draw.choice([0, draw.randrange(1, 5000)])
    who = draw.choice(["worker", "agent", "launcher", "group"])
    return f"{who} {event} {rank} {draw.randint(1, EVENTS[event])} {delay}"


def train(launch: Launch, name: str, layout: Layout, kill: str) -> int:
    """One launch, to its end or the kill, in a session of its own so that its whole group can be killed."""
    processes, strategy = layout
    flags = ("--cpu", "--num_processes", str(processes), "--strategies", strategy)
    run = launch.start(*flags, SCRIPT, launch.folder, name, env={"KILL": kill}, start_new_session=True)
    _, error = run.communicate(timeout=120)
    assert run.returncode == 0 or kill != "none", error
    assert "Error" not in error or kill != "none", error
    return run.returncode


def killed_runs(launch: Launch, kills: int, seed: int, layouts: list[Layout]) -> Iterator[str]:
    """Train with kills, then to the end; yields the order of each kill that happened."""
    draw = random.Random(seed)
    happened = name = 0
    while happened < kills and not (launch.folder / "hash").exists():
        layout = draw.choice(layouts)
        kill = order(draw, layout[0])
        if train(launch, f"{name:03}", layout, kill):
            happened += 1
            yield f"{layout} {kill}"
        name += 1
    train(launch, f"{name:03}", draw.choice(layouts), "none")


def ledger(folder: Path) -> list[list[int]]:
    """The samples of each micro-batch that is in the weights, in order; what a checkpoint did not have is dropped."""
    found: dict[int, list[tuple[int, list[int]]]] = {}
    for name in sorted({path.suffixes[0] for path in folder.glob("ledger.*")}):
        ranks = [path.read_text().splitlines() for path in sorted(folder.glob(f"ledger{name}.*"))]
        ranks = [lines for lines in ranks if lines]
        if not ranks:
            continue
        start = int(ranks[0][0].removeprefix("from "))
        found = {step: batches for step, batches in found.items() if step < start}
        for row in zip(*(lines[1:] for lines in ranks), strict=False):  # a rank may have been killed before another
            (step,) = {int(line.split()[0]) for line in row}
            (epoch,) = {int(line.split()[1]) for line in row}
            found.setdefault(step, []).append((epoch, [int(i) for line in row for i in line.split()[2:]]))
    assert sorted(found) == list(range(STEPS))
    return [[epoch, *ids] for step in sorted(found) for epoch, ids in found[step]]


def check(launch: Launch, kills: int, seed: int, layouts: list[Layout]) -> None:
    """Kill and resume until so many kills have happened, in as many trainings as that takes."""
    home, happened = launch.folder, 0
    launch.folder = home / "whole"
    launch.folder.mkdir()
    train(launch, "000", layouts[0], "none")
    whole, weights = ledger(launch.folder), (launch.folder / "hash").read_text()
    assert sorted(i for _, *ids in whole for i in ids) == sorted([*range(SAMPLES)] * EPOCHS)
    while happened < kills:
        launch.folder = home / f"{happened}"
        launch.folder.mkdir()
        orders = list(killed_runs(launch, kills - happened, seed + happened, layouts))
        assert ledger(launch.folder) == whole, orders
        if len(layouts) == 1:
            assert (launch.folder / "hash").read_text() == weights, orders
        assert orders, "nothing was killed"
        happened += len(orders)


@pytest.mark.timeout(300)
def test_killed_on_the_same_layout_the_weights_are_the_same(launch: Launch) -> None:
    check(launch, kills=3, seed=2, layouts=[(2, "ddp")])


@pytest.mark.timeout(300)
def test_killed_and_resumed_on_other_layouts(launch: Launch) -> None:
    check(launch, kills=2, seed=3, layouts=LAYOUTS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layouts", [[(2, "ddp")], LAYOUTS], ids=["same", "others"])
def test_killed_many_times(launch: Launch, layouts: list[Layout]) -> None:
    check(launch, kills=25, seed=100, layouts=layouts)
