"""`max_restarts` and exit code 75: who is started again, how often, and what is said."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from .conftest import QUICK, Launch, wait_until
from .test_signals import agent_of

COUNTS = """
attempt = len([name for name in os.listdir(os.environ["MARKS"]) if name.startswith(f"try{rank}.")]) + 1
mark(f"try{rank}")
"""


def attempts(launch: Launch, rank: int = 0) -> int:
    return len(list(launch.folder.glob(f"try{rank}.*")))


def test_a_failure_is_tried_again_and_the_attempt_is_named(launch: Launch) -> None:
    script = launch.script(COUNTS + "sys.exit(f'wrong {attempt}' if rank == 1 and attempt < 3 else 0)")
    done = launch.run(*QUICK, "--num_processes", "2", "--max_restarts", "4", script)
    assert done.returncode == 0
    said = done.stderr.splitlines()
    assert said == [
        "accel: rank 1 of 2 failed:",
        "wrong 1",
        "accel: attempt 2 of 5",
        "accel: rank 1 of 2 failed:",
        "wrong 2",
        "accel: attempt 3 of 5",
    ]
    assert attempts(launch) == 3


@pytest.mark.parametrize(("restarts", "count"), [(0, 1), (2, 3)])
def test_it_gives_up_with_the_last_failures_code(launch: Launch, restarts: int, count: int) -> None:
    script = launch.script(COUNTS + "sys.exit(10 + attempt)")
    done = launch.run(*QUICK, "--max_restarts", str(restarts), script)
    assert (done.returncode, attempts(launch)) == (10 + count, count)


def test_each_attempt_meets_anew(launch: Launch) -> None:
    """One process of the first attempt is killed while the others wait for it; the next must not see that store."""
    source = COUNTS + textwrap.dedent("""
    from accel import Accelerator
    accelerator = Accelerator()
    if rank == 0 and attempt == 1:
        os.kill(os.getpid(), 9)
    import torch
    total = accelerator.reduce(torch.tensor(float(rank + attempt)))
    accelerator.print("total", total.item())
    """)
    flags = ("--cpu", "--num_processes", "2", "--max_restarts", "1", "--launcher", "{local: {prefix: true}}")
    done = launch.run(*flags, launch.script(source))
    assert (done.returncode, done.stdout) == (0, "[0] total 5.0\n"), done.stderr
    assert done.stderr.splitlines()[-1] == "accel: attempt 2 of 2"


def test_saved_workers_go_on_if_asked_and_else_end_with_75(launch: Launch) -> None:
    script = launch.script(COUNTS + "sys.exit(75 if attempt == 1 else 0)")
    two = (*QUICK, "--num_processes", "2")
    done = launch.run(*two, "--max_restarts", "1", script)
    assert (done.returncode, done.stderr) == (0, "accel: attempt 2 of 2\n")
    script = launch.script("time.sleep(rank); mark('end'); sys.exit(75)")  # who ends first does not end the other
    done = launch.run(*two, script)
    assert (done.returncode, done.stderr, len(launch.pids("end", 2))) == (75, "", 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_to_the_launcher_reach_the_workers(launch: Launch, number: signal.Signals) -> None:
    """Whoever ends the launcher wants no further attempt; SIGUSR1 is only passed on."""
    source = COUNTS + textwrap.dedent(f"""
    import signal
    signal.signal({int(number)}, lambda *_: sys.exit(75))
    mark('up')
    if attempt == 1: time.sleep(60)
    """)
    run = launch.start(*QUICK, "--num_processes", "2", "--max_restarts", "3", launch.script(source))
    launch.pids("up", 2)
    run.send_signal(number)
    _, error = run.communicate(timeout=30)
    if number == signal.SIGTERM:
        assert (run.returncode, error, attempts(launch)) == (75, "", 1)
    else:
        assert (run.returncode, error, attempts(launch)) == (0, "accel: attempt 2 of 4\n", 2)


def test_the_time_limit_counts_over_all_attempts(launch: Launch) -> None:
    source = COUNTS + textwrap.dedent("""
    from accel.config import current_config
    mark(f"limit{attempt}", str(current_config().time_limit))
    time.sleep(2.5)
    sys.exit(75)
    """)
    done = launch.run(*QUICK, "--max_restarts", "9", "--time_limit", "4", launch.script(source))
    assert (done.returncode, attempts(launch)) == (75, 2)
    limits = [float(next(launch.folder.glob(f"limit{n}.*")).read_text()) for n in (1, 2)]
    assert limits[0] == 4 and 0 <= limits[1] <= 1.5


def test_restarts_of_several_machines_are_refused(launch: Launch) -> None:
    flags = ("--num_machines", "2", "--num_processes", "2", "--main_process_port", "29555", "--max_restarts", "1")
    done = launch.run(*QUICK, *flags, launch.script(""))
    assert done.returncode == 2
    assert "max_restarts: 1 needs num_machines 1, got 2" in done.stderr


def test_a_preempted_training_goes_on_by_itself(launch: Launch) -> None:
    """SIGTERM to one worker: all save, exit, and are started again; the example is a plain loop."""
    example = Path(__file__).parents[2] / "examples" / "resume.py"
    flags = ("--cpu", "--num_processes", "2", "--save_on_signal", "--max_restarts", "1")
    whole = launch.run("--cpu", "--num_processes", "2", "--project_dir", "whole", example, "--epochs", "3")
    run = launch.start(*flags, "--project_dir", "stopped", example, "--epochs", "3", "--seconds", "0.01")
    wait_until(lambda: (launch.folder / "stopped" / "checkpoints" / "checkpoint_0").exists())
    agent = agent_of(run)
    workers = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    os.kill(int(workers[1]), signal.SIGTERM)
    out, error = run.communicate(timeout=100)
    assert run.returncode == 0, error
    assert re.search(r"SIGTERM on rank 1: saved \S+, exit code 75\naccel: attempt 2 of 2\n", error), error
    assert out.splitlines()[-1] == whole.stdout.splitlines()[-1]


@pytest.mark.slow
def test_torchrun_may_restart_a_run(tmp_path: Path) -> None:
    """Its store keeps what the processes before wrote: where they listened, and to which points they came."""
    script = tmp_path / "script.py"
    script.write_text(
        "import accel, os, torch\n"
        "accelerator = accel.Accelerator(device='cpu')\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    accelerator.wait_for_everyone()\n"
        "    os._exit(accelerator.process_index)\n"
        "print('sum', int(accelerator.reduce(torch.ones(()))))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "1", "--nproc_per_node", "2", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert result.stdout.count("sum 2") == 2
