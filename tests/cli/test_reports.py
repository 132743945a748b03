"""`accel plugins` and `accel env`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from accel import registry
from accel.cli import main

from ..package_site import PackageSite

TRACKER = "from accel.interfaces import Tracker\nclass Plugin(Tracker):\n    '''Tracks.'''\n"


def _accel(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "accel.cli", *arguments], capture_output=True, text=True, check=True)


def test_plugins_lists_each_kind_name_package_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == 0
    printed = capsys.readouterr().out
    assert [block.splitlines()[0] for block in printed.split("\n\n")] == list(registry.KINDS)
    for entry in registry.listings():
        assert any(line.split() == [entry.name, entry.package, *entry.summary.split()] for line in printed.splitlines())


def test_plugins_of_one_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "precision"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["precision", "bf16", "fp16", "fp32"]


def test_plugins_marks_what_cannot_be_used(child_site: PackageSite) -> None:
    child_site.install("first-tracker", "tracker", "twice", TRACKER)
    child_site.install("second-tracker", "tracker", "twice", TRACKER)
    child_site.install("gone-tracker", "tracker", "gone", "")
    marked = [
        line.split(maxsplit=3) for line in _accel("plugins", "tracker").stdout.splitlines() if line.startswith("!")
    ]
    assert [(name, package) for _, name, package, _ in marked] == [
        ("gone", "gone-tracker"),
        ("twice", "first-tracker"),
        ("twice", "second-tracker"),
    ]
    assert marked[0][3] == "cannot be read: no module gone_tracker"
    assert marked[1][3].startswith("claimed by several packages: first-tracker (first_tracker:Plugin), second-tracker")


def test_env_reports_what_a_bug_report_needs(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_path.parent.mkdir(parents=True)
    config_path.write_text("num_processes: 3\nstrategies: single\n")
    monkeypatch.setenv("ACCEL_DATA_SEED", "7")
    monkeypatch.setenv("ACCEL_API_KEY", "s3cret")
    printed = _accel("env").stdout
    lines = [line.split() for line in printed.splitlines()]
    assert lines[0] == ["```text"] and lines[-1] == ["```"]
    assert ["num_processes", "3", str(config_path)] in lines
    assert ["data_seed", "7", "environment", "ACCEL_DATA_SEED"] in lines
    assert ["ACCEL_DATA_SEED", "7"] in lines
    assert any(line[:2] == ["problem", "strategies.single.size:"] for line in lines)
    assert any(line[:3] == ["device", "cpu", "count"] for line in lines)
    assert any(line[:2] == ["precision", "bf16"] for line in lines)
    assert {"python", "accel-torch", "torch", "system", "cpu", "memory"} <= {line[0] for line in lines if line}
    assert "s3cret" not in printed


def test_env_works_with_a_broken_config_and_without_torch(child_site: PackageSite, config_path: Path) -> None:
    (child_site.folder / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')")
    config_path.parent.mkdir(parents=True)
    config_path.write_text("num_processes: [\n")
    printed = _accel("env").stdout
    assert "torch is not installed" in printed
    assert f"problem      {config_path}: not valid YAML" in printed
