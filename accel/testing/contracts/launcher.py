"""What a launcher promises: a world of workers, and of their exit codes the first that is not 0."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...config import CONFIG_VARIABLE
from .case import Case

LAUNCH = """
import sys
from pathlib import Path
from accel import registry
from accel.config import Choice, Config
from accel.interfaces.launcher import Command
import json
choice, n, script, arguments = json.loads(sys.argv[1])
config = Config().replace(num_processes=n, launcher=choice, device="cpu")
plugin, options = registry.load_choice("launcher", config.launcher, "launcher")
sys.exit(plugin(options).launch(Command(script, arguments), config))
"""

SCRIPT = """
import json, os, sys, time
from pathlib import Path
folder, failing, code = sys.argv[1:]
rank = os.environ["RANK"]
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "{variable}")
state = {{"pid": os.getpid(), "environment": {{name: os.environ.get(name) for name in names}}}}
Path(folder, rank + ".writing").write_text(json.dumps(state))
Path(folder, rank + ".writing").rename(Path(folder, rank))
if failing == "none":
    sys.exit(0)
while len([name for name in os.listdir(folder) if name.isdecimal()]) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.01)
if rank == failing:
    sys.exit(int(code))
time.sleep(60)
"""


def gives_workers_their_place(case: Case) -> None:
    """Each worker finds torch's variables and the whole config in its environment; success is exit code 0."""
    for size in case.sizes:
        code, workers = _launch(case, size, "none", 0)
        assert code == 0, f"{size} workers ended well, yet launch returned {code}"
        assert sorted(workers) == list(range(size))
        for rank, worker in workers.items():
            found = worker["environment"]
            assert found["RANK"] == found["LOCAL_RANK"] == str(rank)
            assert found["WORLD_SIZE"] == found["LOCAL_WORLD_SIZE"] == str(size)
            assert size == 1 or (found["MASTER_ADDR"] and found["MASTER_PORT"])
            assert found[CONFIG_VARIABLE], f"{CONFIG_VARIABLE} is not set"


def ends_the_rest_at_the_first_failure(case: Case) -> None:
    """One worker exits with code 3 while the others run: launch returns 3, and no worker is left."""
    size = case.sizes[-1]
    for failing in sorted({0, size - 1}):
        code, workers = _launch(case, size, str(failing), 3)
        assert code == 3, f"rank {failing} exited with 3, launch returned {code}"
        left = [rank for rank, worker in workers.items() if _alive(worker["pid"])]
        assert left == [], f"rank {failing} failed, yet ranks {left} are still running"


CONTRACTS = (gives_workers_their_place, ends_the_rest_at_the_first_failure)


def _launch(case: Case, size: int, failing: str, code: int) -> tuple[int, dict[int, Any]]:
    """The exit code of a launch in a process of its own, and what each worker said of itself."""
    with TemporaryDirectory() as folder:
        script, said = Path(folder, "script.py"), Path(folder, "said")
        said.mkdir()
        script.write_text(SCRIPT.format(variable=CONFIG_VARIABLE))
        order = json.dumps([case.choice.dump(), size, str(script), [str(said), failing, str(code)]])
        done = subprocess.run([sys.executable, "-c", LAUNCH, order], capture_output=True, text=True, timeout=120)
        workers = {int(file.name): json.loads(file.read_text()) for file in said.iterdir() if file.name.isdecimal()}
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, workers


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
