"""Every example runs, without a launcher and on two processes, and does what it says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from accel import registry

from .commands import ROOT, run

ONE = ("python",)
TWO = ("accel", "launch", "--cpu", "--num_processes", "2")
TEST_IMAGES = 1797 - 1400
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
LAYOUTS = sorted((ROOT / "examples" / "layouts").glob("*.yaml"))
TINY = ("--layers", "4", "--width", "32", "--context", "32", "--steps", "20", "--lr", "1e-2", "--megabytes", "0.1")


def accuracy(output: str) -> float:
    found = re.search(rf"test accuracy ([\d.]+) on {TEST_IMAGES} images", output)
    assert found, output
    return float(found[1])


@pytest.mark.parametrize(("command", "steps"), [(ONE, 660), (TWO, 330)], ids=["one", "two"])
def test_image_classification(command: tuple[str, ...], steps: int) -> None:
    done = run(*command, "examples/image_classification.py")
    assert accuracy(done.stdout) >= 0.95
    assert done.stdout.count("test accuracy") == 1
    assert done.stderr.count(f"| 0/{steps} ") == 1, "one progress bar, on the main process"
    assert f"{steps}/{steps}" in done.stderr


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_configs(config: Path) -> None:
    done = run("accel", "launch", "--config_file", str(config), "examples/image_classification.py", "--epochs", "4")
    assert accuracy(done.stdout) >= 0.85


def test_there_is_a_config_for_each_strategy_and_precision() -> None:
    text = "\n".join(config.read_text() for config in (*CONFIGS, *LAYOUTS))
    for name in registry.names("strategy"):
        assert re.search(rf"\b{name}\b", text), name
    assert {"bf16", "fp16"} <= {config.stem for config in CONFIGS}


@pytest.mark.parametrize("processes", [1, 2])
def test_script_that_only_changed_its_import(processes: int) -> None:
    flags = ("--config_file", "examples/default_config.yaml", "--num_processes", str(processes))
    done = run("accel", "launch", *flags, "examples/my_training_script.py")
    losses = [float(loss) for loss in re.findall(r"^Epoch \d, Loss: ([\d.]+)$", done.stdout, re.M)]
    assert len(losses) == 10 * processes
    assert 0.5 < losses[-1] < 1.5  # noise is all that there is to learn


@pytest.fixture(scope="module")
def losses_of_one() -> list[float]:
    """Losses of the language model on one process."""
    return losses_in(run(*ONE, "examples/language_model.py", *TINY, "--sample", "1"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.stem)
def test_layouts(layout: Path, losses_of_one: list[float]) -> None:
    command = ("accel", "launch", "--config_file", str(layout), "examples/language_model.py", *TINY, "--sample", "20")
    done = run(*command)
    assert len(losses_of_one) == 11
    assert losses_in(done) == pytest.approx(losses_of_one, abs=2e-3)
    assert done.stdout.count("def ") == 1


def losses_in(done: subprocess.CompletedProcess[str]) -> list[float]:
    return [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", done.stdout + done.stderr)]


@pytest.mark.parametrize("command", [ONE, TWO], ids=["one", "two"])
def test_language_model(command: tuple[str, ...]) -> None:
    size = ("--layers", "1", "--width", "32", "--context", "32", "--steps", "60", "--lr", "1e-2", "--megabytes", "0.2")
    done = run(*command, "examples/language_model.py", *size, "--sample", "40")
    losses = losses_in(done)
    assert len(losses) == 11
    assert losses[0] > 5
    assert losses[-1] < 4
    assert done.stdout.count("def ") >= 1


def test_language_model_accumulates() -> None:
    size = ("--layers", "1", "--width", "32", "--context", "16", "--steps", "10", "--megabytes", "0.1", "--sample", "1")
    done = run(*TWO, "--gradient_accumulation_steps", "2", "examples/language_model.py", *size)
    assert "step 10: loss" in done.stdout + done.stderr
    assert "step 11: loss" not in done.stdout + done.stderr
