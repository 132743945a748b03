"""What comes of a worker that fails: one report, the right exit code, nobody left."""

from __future__ import annotations

import os
import re
import signal

import pytest

from accel.launch.failures import Failure, culprit, report

from .conftest import QUICK, Launch, running

WAIT = """
mark('up')
while len([name for name in os.listdir() if name.startswith('up.')]) < {}: time.sleep(0.02)
"""


def fail(launch: Launch, source: str, processes: int = 3, flags: tuple[str, ...] = QUICK) -> tuple[int, str]:
    """Run a script in which rank 1 fails once all have started and the others sleep; none may be left."""
    script = launch.script(WAIT.format(processes) + f"if rank == 1:\n    {source}\ntime.sleep(60)\n")
    result = launch.run(*flags, "--num_processes", str(processes), script)
    assert running(launch.pids("up", processes)) == []
    assert result.stdout == ""
    return result.returncode, result.stderr


def test_exception_is_shown_once(launch: Launch) -> None:
    code, shown = fail(launch, "raise ValueError('wrong')")
    path = launch.folder / "script.py"
    assert code == 1
    assert shown.startswith(f'accel: rank 1 of 3 failed:\nTraceback (most recent call last):\n  File "{path}", line')
    assert shown.endswith("ValueError: wrong\n")
    assert shown.count("File ") == 1


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        ("sys.exit(3)", 3, "accel: rank 1 of 3 exited with code 3\n"),
        ("sys.exit('as text')", 1, "accel: rank 1 of 3 failed:\nas text\n"),
        ("os._exit(7)", 7, "accel: rank 1 of 3 exited with code 7\n"),
        ("os.kill(os.getpid(), 10)", 138, "accel: rank 1 of 3 was killed by SIGUSR1\n"),
        (
            "os.kill(os.getpid(), 9)",
            137,
            "accel: rank 1 of 3 was killed by SIGKILL (as the system does when memory runs out)\n",
        ),
    ],
)
def test_exit_codes(launch: Launch, source: str, code: int, message: str) -> None:
    assert fail(launch, source) == (code, message)


def test_a_worker_that_ignores_the_end_is_killed(launch: Launch) -> None:
    stubborn = "import signal; signal.signal(15, signal.SIG_IGN)\n"
    script = launch.script(stubborn + WAIT.format(2) + "sys.exit(4) if rank else time.sleep(60)")
    assert launch.run(*QUICK, "--num_processes", "2", script).returncode == 4
    assert running(launch.pids("up", 2)) == []


def test_children_of_workers_are_ended(launch: Launch) -> None:
    code, _ = fail(launch, "raise ValueError", 2)
    orphan = "import subprocess; p = subprocess.Popen(['sleep', '60']); mark('child', str(p.pid))\n"
    script = launch.script(orphan + "mark('more'); time.sleep(0.5); os.kill(os.getpid(), 9)")
    assert code == 1 and launch.run(*QUICK, script).returncode == 137
    [pid] = [int(path.read_text()) for path in launch.folder.glob("child.*")]
    assert running([pid]) == []


def test_crash_shows_the_lines_that_led_to_it(launch: Launch) -> None:
    code, shown = fail(launch, "import ctypes; ctypes.string_at(0)")
    first, *others = shown.splitlines()
    assert (code, first) == (139, "accel: rank 1 of 3 was killed by SIGSEGV:")
    assert others[0] == "Fatal Python error: Segmentation fault" and str(launch.folder / "script.py") in others[-1]


def test_peers_that_lost_another_are_only_counted(launch: Launch) -> None:
    source = """
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    dist.barrier()
    if rank == 1:
        raise ValueError("the cause")
    dist.all_reduce(torch.ones(3))
    """
    result = launch.run("--cpu", "--num_processes", "3", launch.script(source))
    assert result.returncode == 1
    assert result.stderr.startswith("accel: rank 1 of 3 failed")
    assert result.stderr.count("Traceback") == 1 and result.stderr.endswith("ValueError: the cause\n")
    assert "worker.py" not in result.stderr and "[rank1]" not in result.stderr


def test_one_process_fails_as_in_python(launch: Launch) -> None:
    path = launch.script("def f():\n    raise KeyError('k')\nf()\n")
    result = launch.run(*QUICK, path)
    lines = result.stderr.splitlines()
    assert result.returncode == 1
    assert lines[0] == "Traceback (most recent call last):" and lines[-1] == "KeyError: 'k'"
    assert result.stderr.count("File ") == 2 and "accel" not in result.stderr.replace(str(launch.folder), "")


@pytest.mark.parametrize(("source", "code", "error"), [("sys.exit(3)", 3, ""), ("sys.exit('text')", 1, "text\n")])
def test_one_process_exits_as_in_python(launch: Launch, source: str, code: int, error: str) -> None:
    result = launch.run(*QUICK, launch.script(source))
    assert (result.returncode, result.stdout, result.stderr.strip("\n")) == (code, "", error.strip("\n"))


@pytest.mark.parametrize("start", ["fork", "exec"])
def test_syntax_error(launch: Launch, start: str) -> None:
    path = launch.folder / "script.py"
    path.write_text("x = = 1\n")
    result = launch.run("--cpu", "--launcher", f"{{local: {{preload: false, start: {start}}}}}", path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[0] == f'  File "{path}", line 1' and "SyntaxError" in result.stderr


def test_our_own_errors_show_the_users_lines_only(launch: Launch) -> None:
    path = launch.script("from accel import Config\nConfig.parse({'num_proceses': 2})\n")
    result = launch.run(*QUICK, path)
    assert result.returncode == 1
    assert result.stderr.count("File ") == 1 and str(path) in result.stderr
    assert "num_proceses: no such setting; did you mean 'num_processes'?" in result.stderr


def test_errors_of_plugins_show_the_users_lines_only(launch: Launch) -> None:
    path = launch.script("import torch, accel\naccel.Accelerator().prepare(torch.nn.ReLU(), torch.nn.Identity())\n")
    result = launch.run("--cpu", "--num_processes", "2", "--strategies", "{tensor: {size: 2}}", path)
    assert result.returncode == 1
    assert result.stderr.count("File ") == 1 and str(path) in result.stderr
    assert "found no inputs on which ReLU runs" in result.stderr


def test_the_users_own_hook_is_asked(launch: Launch) -> None:
    source = "sys.excepthook = lambda kind, error, trace: print('hook saw', kind.__name__, file=sys.stderr)\n1 / 0\n"
    result = launch.run(*QUICK, launch.script(source))
    assert (result.returncode, result.stderr) == (1, "hook saw ZeroDivisionError\n")


def test_module_that_is_not_there(launch: Launch) -> None:
    launch.script("", "package/__init__.py").write_text("")
    result = launch.run(*QUICK, "-m", "package.nothing")
    assert (result.returncode, result.stderr) == (
        1,
        "accel: -m package.nothing: no such module, or it has no code to run\n",
    )


def test_culprit_is_the_first_that_did_not_just_lose_a_peer() -> None:
    lost = Failure(0, 1, 1.0, "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    cause, later = Failure(1, -signal.SIGKILL, 2.0), Failure(2, 1, 3.0, "ValueError: x")
    assert culprit([later, lost, cause]) == cause
    assert culprit([lost]) == lost
    assert report([lost, cause, later], 4, [3]).endswith("memory runs out); 2 more failed after it\n")
    assert "; before that, rank 0, 2 had ended without an error:\nRuntimeError" in report([lost], 4, [0, 2])


def test_report_of_an_unfinished_failure_is_none(tmp_path: os.PathLike[str]) -> None:
    file = os.open(os.path.join(tmp_path, "report"), os.O_RDWR | os.O_CREAT)
    try:
        assert Failure.read(file) is None
        os.write(file, b'{"rank": 0, ')
        assert Failure.read(file) is None
        failure = Failure(3, 1, 5.0, "text\n")
        failure.write(file)
        assert Failure.read(file) == failure
    finally:
        os.close(file)


def test_a_process_that_ends_while_another_waits_is_named_once(launch: Launch) -> None:
    """By whichever of both is late."""
    source = "import accel\naccelerator = accel.Accelerator()\naccelerator.wait_for_everyone()\n"
    waits = "if rank == 0:\n    time.sleep({})\n    accelerator.gather(__import__('torch').ones(1))\ntime.sleep({})\n"
    for late in ((0, 1), (1, 0)):
        path = launch.script(source + waits.format(*late))
        result = launch.run("--cpu", "--num_processes", "3", path)
        said = [line for line in result.stderr.splitlines() if "came to" in line]
        assert result.returncode == 1 and len(said) == 1
        assert re.search(rf"rank 0 came to accelerator\.gather at {path}:\d+, and rank . came to the end of", said[0])
