"""A package of its own adds a strategy and a precision: installed, listed, trained with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .commands import ROOT, install_third_party, run
from .test_examples import accuracy

SOURCE = ROOT / "examples" / "third_party"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the package is installed, and nothing else."""
    target = tmp_path_factory.mktemp("site")
    install_third_party(target)
    return target


@pytest.mark.parametrize("processes", [1, 2])
def test_trains_with_both(installed: Path, processes: int) -> None:
    flags = ("--cpu", "--num_processes", str(processes), "--strategy", "averaging", "--mixed_precision", "lean_bf16")
    done = run("accel", "launch", *flags, "examples/image_classification.py", "--epochs", "4", path=installed)
    assert accuracy(done.stdout) >= 0.85


def test_trains_as_ddp_does(installed: Path) -> None:
    """The same losses to the last digit that is printed, through a window that the end of the loader cuts short."""
    outputs = []
    for strategy in ("averaging", "ddp"):
        flags = ("--cpu", "--num_processes", "2", "--strategy", strategy, "--gradient_accumulation_steps", "3")
        done = run("accel", "launch", *flags, "examples/image_classification.py", "--epochs", "2", path=installed)
        outputs.append((accuracy(done.stdout), re.findall(r"loss=([\d.]+)", done.stderr)[-1]))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(("kind", "name"), [("strategy", "averaging"), ("precision", "lean_bf16")])
def test_keeps_the_contracts_of_its_kind(installed: Path, kind: str, name: str) -> None:
    done = run("accel", "test", kind, name, path=installed)
    assert re.search(r"^\d+ ok", done.stdout, re.M), done.stdout


def test_is_listed_with_its_package(installed: Path) -> None:
    listed = run("accel", "plugins", path=installed).stdout
    for name, meaning in {"averaging": "Averages all gradients in one message", "lean_bf16": "less memory"}.items():
        (line,) = [line for line in listed.splitlines() if f" {name} " in line]
        assert "accel-example-plugins" in line
        assert meaning in line


def test_is_small() -> None:
    lines = [line for file in SOURCE.iterdir() if file.is_file() for line in file.read_text().splitlines()]
    assert len([line for line in lines if line.strip()]) <= 70
