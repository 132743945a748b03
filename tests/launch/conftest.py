"""`accel launch` as a user runs it: a command, a script in a folder, what is printed, what is left running."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

QUICK = ("--cpu", "--launcher", "{local: {preload: false}}")
"""For scripts without torch: nobody imports it."""

Running = subprocess.Popen[str]


class Launch:
    """Starts `accel launch` on scripts in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Running] = []

    def script(self, source: str, name: str = "script.py") -> Path:
        """Write a script. `mark(name)` in it makes a file, named after the process, that `pids` finds."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEADER + textwrap.dedent(source))
        return path

    def start(
        self,
        *arguments: str | Path,
        env: dict[str, str] | None = None,
        stdin: Path = Path(os.devnull),
        start_new_session: bool = False,
    ) -> Running:
        """Start the command and return at once."""
        with stdin.open() as file:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "accel.cli", "launch", *map(str, arguments)],
                cwd=self.folder,
                env={**os.environ, "XDG_CONFIG_HOME": str(self.folder), "MARKS": str(self.folder), **(env or {})},
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=hear_ctrl_c,
                start_new_session=start_new_session,
            )
        self.started.append(process)
        return process

    def run(self, *arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        process = self.start(*arguments, env=env)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def pids(self, name: str, count: int) -> list[int]:
        """The processes that have marked this name, once there are `count`."""
        wait_until(lambda: len(list(self.folder.glob(f"{name}.*"))) >= count)
        return sorted(int(path.suffix[1:]) for path in self.folder.glob(f"{name}.*"))


def hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests may themselves run where it is ignored


HEADER = """\
import os, sys, time
def mark(name, text=""):
    with open(os.path.join(os.environ["MARKS"], f"{name}.{os.getpid()}"), "w") as file:
        file.write(text)
rank = int(os.environ["RANK"])
"""


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    """Wait for a condition to hold; fails the test if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def running(pids: Sequence[int]) -> list[int]:
    """Those of these processes that still run."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(pid)
    return found


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    launcher = Launch(tmp_path)
    yield launcher
    for process in launcher.started:
        if process.poll() is None:
            process.kill()
        process.communicate()
