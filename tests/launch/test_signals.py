"""Ctrl-C, SIGTERM and kill -9, of every process of a run: the exit code is right, and nobody is left."""

from __future__ import annotations

import os
import pty
import signal
import time
from pathlib import Path

import pytest

from .conftest import QUICK, Launch, Running, hear_ctrl_c, running, wait_until

PATIENT = ("--cpu", "--launcher", "{local: {preload: false, grace: 20}}")
"""For workers that take a while to end, and a machine that is busy."""

SLEEP = "mark('up')\ntime.sleep(60)\n"
CHILDREN = "import subprocess; mark('child', str(subprocess.Popen(['sleep', '60']).pid))\n"


def agent_of(run: Running) -> int:
    return int(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text())


def start(launch: Launch, source: str = SLEEP, flags: tuple[str, ...] = QUICK) -> tuple[Running, list[int]]:
    """A run whose workers all sleep, and all its processes but the launcher."""
    run = launch.start(*flags, "--num_processes", "2", launch.script(source))
    return run, [*launch.pids("up", 2), agent_of(run)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_the_run_quietly(launch: Launch, number: signal.Signals, code: int) -> None:
    run, others = start(launch)
    run.send_signal(number)
    assert run.communicate(timeout=30) == ("", "")
    assert (run.returncode, running(others)) == (code, [])


def test_workers_hear_of_ctrl_c_once_and_may_tidy_up(launch: Launch) -> None:
    source = """
    try:
        mark('up'); time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.3); print('tidy', flush=True); sys.exit(0)
    """
    run, others = start(launch, source, PATIENT)
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=30) == ("tidy\ntidy\n", "")
    assert (run.returncode, running(others)) == (130, [])


def test_a_worker_deaf_to_ctrl_c_is_killed(launch: Launch) -> None:
    run, others = start(launch, "import signal; signal.signal(2, signal.SIG_IGN)\n" + SLEEP)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=30)
    assert (run.returncode, running(others)) == (130, [])


def test_sigterm_lets_workers_take_their_time(launch: Launch) -> None:
    source = """
    import signal
    signal.signal(15, lambda *_: (time.sleep(1.5), print('saved', flush=True), os._exit(0)))
    mark('up'); time.sleep(60)
    """
    run, others = start(launch, source)
    run.send_signal(signal.SIGTERM)
    assert run.communicate(timeout=30) == ("saved\nsaved\n", "")
    assert (run.returncode, running(others)) == (143, [])


def test_killed_launcher_leaves_nobody(launch: Launch) -> None:
    run, others = start(launch, CHILDREN + SLEEP)
    children = [int(path.read_text()) for path in launch.folder.glob("child.*")]
    run.kill()
    wait_until(lambda: not running([*others, *children]), 30)


def test_killed_launcher_and_agent_leave_no_worker(launch: Launch) -> None:
    run, others = start(launch)
    os.kill(others[-1], signal.SIGSTOP)  # so that it does not notice first
    run.kill()
    os.kill(others[-1], signal.SIGKILL)
    wait_until(lambda: not running(others), 30)


def test_killed_agent_leaves_nobody(launch: Launch) -> None:
    run, others = start(launch)
    os.kill(others[-1], signal.SIGKILL)
    out, error = run.communicate(timeout=30)
    assert (run.returncode, out) == (137, "")
    assert error == "accel: the agent, which runs the workers, was killed by SIGKILL\n"
    wait_until(lambda: not running(others), 30)


@pytest.mark.parametrize("delay", [0.1, 0.3, 0.6])
def test_ctrl_c_while_the_agent_warms_up(launch: Launch, delay: float) -> None:
    run = launch.start("--cpu", "--num_processes", "2", launch.script(SLEEP))
    wait_until(lambda: bool(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text()))
    agent = agent_of(run)
    time.sleep(delay)
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=30) == ("", "")
    assert (run.returncode, running([agent])) == (130, [])


def test_killed_worker_ends_the_others(launch: Launch) -> None:
    run, others = start(launch)
    os.kill(others[0], signal.SIGKILL)
    _, error = run.communicate(timeout=30)
    assert run.returncode == 137 and "was killed by SIGKILL" in error
    assert running(others) == []


def test_exec_workers_do_not_outlive_the_agent(launch: Launch) -> None:
    options = "{local: {preload: false, start: exec}}"
    run = launch.start("--cpu", "--num_processes", "2", "--launcher", options, launch.script(SLEEP))
    workers = launch.pids("up", 2)
    os.kill(agent_of(run), signal.SIGKILL)
    wait_until(lambda: not running(workers), 30)


def test_ctrl_c_in_a_terminal(launch: Launch) -> None:
    """The terminal sends the signal to every process itself; each worker must hear it once all the same."""
    source = """
    heard = []
    import signal
    signal.signal(2, lambda *_: heard.append(1))
    mark('up')
    while not heard: time.sleep(0.01)
    time.sleep(0.4)
    mark('heard', str(len(heard)))
    """
    path = launch.script(source)
    child, terminal = pty.fork()
    if not child:
        hear_ctrl_c()
        os.chdir(launch.folder)
        os.environ.update(XDG_CONFIG_HOME=str(launch.folder), MARKS=str(launch.folder))
        import sys

        os.execv(
            sys.executable, [sys.executable, "-m", "accel.cli", "launch", *PATIENT, "--num_processes", "2", str(path)]
        )
    workers = launch.pids("up", 2)
    os.write(terminal, b"\x03")
    launch.pids("heard", 2)
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130
    assert [path.read_text() for path in launch.folder.glob("heard.*")] == ["1", "1"]
    assert running(workers) == []
