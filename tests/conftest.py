"""What every test has: warm processes, a skip for missing hardware, and a guard against what it leaves behind."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.resource_tracker import _resource_tracker  # lives as long as the process that first spawned
from pathlib import Path
from pkgutil import walk_packages

import accel_plugins
import pytest

from accel.testing import shared_processes

ROOT = Path(__file__).parents[1]
PATIENCE = 4.0
"""Seconds that a test's threads and processes get to end by themselves."""

LASTING = {"tqdm_monitor"}
"""Threads that a library keeps, once started, for as long as the process lives."""

CACHES = {".pytest_cache", ".mypy_cache", ".ruff_cache", "__pycache__"}
"""What tools, not tests, write into the working folder."""

UNWATCHED = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}
"""Variables that pytest sets, and torch when the first optimizer of a process imports its compiler."""


@pytest.fixture(scope="session", autouse=True)
def warm() -> Iterator[None]:
    """Let workers find imported what most tests import; end the warm process with the session."""
    gc.freeze()  # what is imported by now stays: nobody need look for garbage among it
    shared_processes().modules += [
        "pytest",
        *(found.name for found in walk_packages(accel_plugins.__path__, "accel_plugins.")),
    ]
    yield
    shared_processes().close()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and this machine has none")


@pytest.fixture(autouse=True)
def guard() -> Iterator[None]:
    """Fail a test that leaves environment variables, threads, processes, process groups or files behind."""
    environment, folder, traces = _environment(), os.getcwd(), _traces()
    yield
    found = _left(traces)
    found["environment variables"] = {name for name, _ in environment.items() ^ _environment().items()}
    found["working folder"] = {os.getcwd()} - {folder}
    _clean_up(environment, folder)
    left = "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in found.items() if names)
    if left:
        pytest.fail(f"the test left behind {left}", pytrace=False)


def _left(traces: dict[str, set[str]]) -> dict[str, set[str]]:
    """What exists now and did not before. What is on its way out, such as a loader's workers, gets time to end."""
    deadline = time.monotonic() + PATIENCE
    while True:
        left = {kind: now - traces[kind] for kind, now in _traces().items()}
        if not (left["threads"] or left["processes"]) or time.monotonic() > deadline:
            return left
        gc.collect()
        time.sleep(0.02)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in UNWATCHED}


def _traces() -> dict[str, set[str]]:
    """What exists now, by kind, of things that a test could leave behind."""
    return {
        "threads": {f"{t.name} ({t.ident})" for t in threading.enumerate() if t.name not in LASTING},
        "processes": _children() - {str(shared_processes().pid), str(_resource_tracker._pid)},
        "process groups": {"torch.distributed"} if _connected() else set(),
        "files": set(os.listdir(ROOT)) - CACHES,
    }


def _children() -> set[str]:
    """Process ids of this process's children, where the system tells them."""
    found: set[str] = set()
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # that thread has just ended
            found.update(file.read_text().split())
    return found


def _connected() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _clean_up(environment: dict[str, str], folder: str) -> None:
    """Spare the next test from what this one left."""
    for name in _environment().keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    os.chdir(folder)
    if _connected():
        sys.modules["torch.distributed"].destroy_process_group()
