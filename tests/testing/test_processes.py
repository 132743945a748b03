"""`accel.testing.run`: results, failures and hangs of forked workers."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from accel.errors import ConfigError
from accel.testing import Processes, WorkerError, run


def rank() -> int:
    return int(os.environ["RANK"])


def sum_of_ranks() -> float:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(value)
    return value.item()


def environment(*names: str) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in names}


def fail(which: int, error: type[Exception]) -> None:
    if rank() == which:
        raise error("num_processes: no")
    time.sleep(30)


class Unpicklable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fail_unpicklable() -> None:
    raise Unpicklable(1, 2)


def leave(code: int) -> None:
    sys.exit(code)


def vanish() -> None:
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)


def hang_here(which: int) -> None:
    if rank() == which:
        time.sleep(30)


def start_child(folder: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(folder, str(rank())).write_text(f"{os.getpid()} {child.pid}")


def say(text: str) -> None:
    print(f"{text} {rank()}\n", end="")  # in one write: two workers share the output


def warn() -> None:
    warnings.warn("a warning", UserWarning, stacklevel=1)


def folder_and_path() -> tuple[str, list[str]]:
    return os.getcwd(), sys.path


def give_lambda() -> object:
    return lambda: None


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def gone(pids: list[int]) -> bool:
    """Whether all these processes end within a few seconds."""
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_processes_form_one_world(n: int) -> None:
    assert run(n, sum_of_ranks) == [float(sum(range(n)))] * n


def test_results_come_in_the_order_of_ranks() -> None:
    assert run(3, rank) == [0, 1, 2]


def test_torch_variables_are_set() -> None:
    first, second = run(2, environment, "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
    assert first == {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    assert second == {**first, "LOCAL_RANK": "1"}


def test_environment_is_the_callers_and_env(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCEL_TEST_ONE", "1")
    monkeypatch.setenv("ACCEL_TEST_TWO", "1")
    [found] = run(1, environment, "ACCEL_TEST_ONE", "ACCEL_TEST_TWO", env={"ACCEL_TEST_TWO": "2"})
    assert found == {"ACCEL_TEST_ONE": "1", "ACCEL_TEST_TWO": "2"}
    monkeypatch.delenv("ACCEL_TEST_ONE")
    assert run(1, environment, "ACCEL_TEST_ONE") == [{"ACCEL_TEST_ONE": None}]


def test_folder_and_import_path_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [(folder, path)] = run(1, folder_and_path)
    assert folder == str(tmp_path)
    assert path == [os.path.abspath(entry) for entry in sys.path]


def test_partial_of_a_function() -> None:
    assert run(1, functools.partial(environment, "RANK"), "WORLD_SIZE") == [{"RANK": "0", "WORLD_SIZE": "1"}]


def test_workers_have_one_thread() -> None:
    assert run(2, threads) == [1, 1]


def test_exception_keeps_its_type_and_names_its_rank() -> None:
    with pytest.raises(ConfigError, match="num_processes: no") as caught:
        run(2, fail, 1, ConfigError)
    [note] = caught.value.__notes__
    assert note.startswith("raised on rank 1:\nTraceback")
    assert 'raise error("num_processes: no")' in note
    assert "warm.py" not in note


def test_first_failure_ends_the_other_workers() -> None:
    with pytest.raises(ValueError, match="num_processes: no"):
        run(3, fail, 0, ValueError, timeout=20)


def test_exception_that_cannot_be_pickled_comes_as_text() -> None:
    with pytest.raises(WorkerError, match="Unpicklable: 1 and 2"):
        run(1, fail_unpicklable)


def test_exit_of_a_worker_does_not_end_the_caller() -> None:
    with pytest.raises(WorkerError, match="SystemExit: 3"):
        run(2, leave, 3)


def test_death_of_a_worker_is_told() -> None:
    with pytest.raises(WorkerError, match="rank 1 was ended by signal 9 before it returned"):
        run(2, vanish)


def test_hang_shows_ranks_and_stacks() -> None:
    with pytest.raises(TimeoutError, match="still running at the timeout: rank 1\n") as caught:
        run(2, hang_here, 1, timeout=3)
    assert "in hang_here" in str(caught.value)
    assert "[rank 0]" not in str(caught.value)


def test_all_hung_ranks_are_named() -> None:
    with pytest.raises(TimeoutError, match="rank 0, 1\n") as caught:
        run(2, time.sleep, 30, timeout=1)
    assert str(caught.value).count("most recent call first") == 2


def test_a_failure_leaves_the_next_call_as_it_was() -> None:
    with pytest.raises(TimeoutError):
        run(1, time.sleep, 30, timeout=0.1)
    assert run(2, sum_of_ranks) == [1.0, 1.0]


def test_children_of_workers_are_ended(tmp_path: Path) -> None:
    run(2, start_child, str(tmp_path))
    pids = [int(pid) for file in tmp_path.iterdir() for pid in file.read_text().split()]
    assert len(pids) == 4
    assert gone(pids)


def test_output_goes_where_the_callers_goes(capfd: pytest.CaptureFixture[str]) -> None:
    run(2, say, "rank")
    assert sorted(capfd.readouterr().out.splitlines()) == ["rank 0", "rank 1"]


def test_warnings_are_filtered_as_in_the_caller() -> None:
    with pytest.raises(UserWarning, match="a warning"):
        run(1, warn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(1, warn)


def test_a_function_that_cannot_be_sent_is_refused() -> None:
    with pytest.raises(TypeError, match="must be picklable, as a function that a module defines is"):
        run(1, lambda: None)


def test_a_result_that_cannot_be_sent_is_told() -> None:
    with pytest.raises(Exception, match="lambda") as caught:
        run(1, give_lambda)
    assert "raised on rank 0" in caught.value.__notes__[0]


SCRIPT = """
import os
from accel.testing import Processes

def double(x):
    return 2 * x * int(os.environ["WORLD_SIZE"])

if __name__ == "__main__":
    with Processes([]) as processes:
        print(processes.run(2, double, 21))
"""


def test_functions_of_a_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert subprocess.check_output([sys.executable, script], text=True, timeout=60) == "[84, 84]\n"


ORPHAN = """
import os, sys, time
from accel.testing import Processes

def work():
    os.write(1, b"%d %d\\n" % (os.getpid(), os.getppid()))
    time.sleep(60)

if __name__ == "__main__":
    Processes([]).run(2, work)
"""


def test_nothing_outlives_a_killed_caller(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ORPHAN)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        pids = [int(pid) for _ in range(2) for pid in caller.stdout.readline().split()]
        caller.kill()
    assert len(set(pids)) == 3
    assert gone(pids)


def test_module_that_is_not_on_the_path(tmp_path: Path) -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    (tmp_path / "hidden_module.py").write_text("def answer():\n    return 42\n")
    spec = spec_from_file_location("hidden_module", tmp_path / "hidden_module.py")
    assert spec is not None and spec.loader is not None
    sys.modules["hidden_module"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        assert run(1, module.answer) == [42]
    finally:
        del sys.modules["hidden_module"]


def test_closing_ends_the_warm_process() -> None:
    with Processes([]) as processes:
        assert processes.run(1, rank) == [0]
        pid = processes.pid
    assert pid is not None and not alive(pid)
    assert processes.pid is None


def test_module_that_fails_to_import_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkerError, match="could not start"):
        Processes(["no_such_module"]).start()
    assert "No module named 'no_such_module'" in capfd.readouterr().err
