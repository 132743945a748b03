"""The leak guard fails tests that leave something behind, each run in a session of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LEAKS = """
import os, subprocess, sys, threading, time
import pytest
from pathlib import Path

def test_new_variable():
    os.environ["ACCEL_LEAK"] = "1"

def test_lost_variable():
    del os.environ["ACCEL_LOSES"]

def test_changed_variable():
    os.environ["ACCEL_LOSES"] = "changed"

def test_thread():
    threading.Thread(target=time.sleep, args=(30,), name="leaked", daemon=True).start()

def test_process():
    test_process.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])

def test_folder(tmp_path):
    os.chdir(tmp_path)

def test_file():
    Path("leaked.txt").touch()

def test_group():
    import torch.distributed as dist
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

@pytest.mark.gpu
def test_gpu():
    import torch
    assert torch.cuda.is_available()

def test_clean(monkeypatch):
    monkeypatch.setenv("ACCEL_LEAK", "1")
"""

EXPECTED = {
    "test_new_variable": "environment variables: ACCEL_LEAK",
    "test_lost_variable": "environment variables: ACCEL_LOSES",
    "test_changed_variable": "environment variables: ACCEL_LOSES",
    "test_thread": "threads: leaked (",
    "test_process": "processes: ",
    "test_folder": "working folder: ",
    "test_file": "files: leaked.txt",
    "test_group": "process groups: torch.distributed",
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest says of the leaking tests, under this suite's own conftest."""
    folder = tmp_path_factory.mktemp("leaks") / "tests"
    folder.mkdir()
    (folder / "test_leaks.py").write_text(LEAKS)
    (folder / "conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "--tb=no", str(folder)]
    environment = {**os.environ, "ACCEL_LOSES": "1", "COLUMNS": "200", "PYTEST_ADDOPTS": "-o markers=gpu:needs-CUDA"}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder.parent, env=environment, timeout=60
    ).stdout


@pytest.mark.parametrize("name", EXPECTED)
def test_guard_names_what_a_test_left(report: str, name: str) -> None:
    [line] = [line for line in report.splitlines() if line.startswith("ERROR") and line.split(" - ")[0].endswith(name)]
    assert f"the test left behind {EXPECTED[name]}" in line


def test_guard_lets_clean_tests_pass(report: str) -> None:
    errors = [line for line in report.splitlines() if line.startswith("ERROR")]
    assert len(errors) == len(EXPECTED), errors
