"""What a worker finds, and what comes of a script that ends well."""

from __future__ import annotations

import os
import signal
from collections import Counter

import pytest

from .conftest import QUICK, Launch

REDUCE = """
import torch, torch.distributed as dist
if int(os.environ["WORLD_SIZE"]) > 1:
    dist.init_process_group("gloo")
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    print("total", total.item(), dist.get_world_size())
else:
    print("total", 1.0, 1)
"""


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_one_world_of_all_processes(launch: Launch, processes: int) -> None:
    result = launch.run("--cpu", "--num_processes", str(processes), launch.script(REDUCE))
    total = float(sum(range(processes + 1)))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [f"total {total} {processes}"] * processes


@pytest.mark.parametrize("options", ["{preload: false}", "{start: exec}", "{start: exec, preload: false}"])
def test_one_world_however_workers_are_made(launch: Launch, options: str) -> None:
    result = launch.run("--cpu", "--num_processes", "2", "--launcher", f"{{local: {options}}}", launch.script(REDUCE))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == ["total 3.0 2"] * 2


def test_forked_workers_find_torch_imported(launch: Launch) -> None:
    script = launch.script("print('torch' in sys.modules)")
    assert launch.run("--cpu", "--num_processes", "2", script).stdout == "True\nTrue\n"
    assert launch.run(*QUICK, "--num_processes", "2", script).stdout == "False\nFalse\n"


def test_scripts_that_name_accel_find_it_imported(launch: Launch) -> None:
    for names, found in ((["torch._dynamo"], "False"), (["torch._dynamo", "accel.accelerator"], "True True")):
        script = launch.script(f"print(*(name in sys.modules for name in {names}))")
        assert launch.run("--cpu", "--num_processes", "2", script).stdout == f"{found}\n" * 2


def test_environment_of_workers(launch: Launch) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS MALLOC_TRIM_THRESHOLD_"
    script = launch.script(f"print(*(os.environ[name] for name in {names.split()}), os.environ['MASTER_PORT'] != '0')")
    flags = (*QUICK, "--num_processes", "3", "--threads_per_process", "5")
    result = launch.run(*flags, script, env={"MALLOC_TRIM_THRESHOLD_": "77", "OMP_NUM_THREADS": "9"})
    assert sorted(result.stdout.splitlines()) == [f"{rank} {rank} 3 3 127.0.0.1 5 77 True" for rank in range(3)]


def test_threads_of_the_user_stay(launch: Launch) -> None:
    script = launch.script("print(os.environ['OMP_NUM_THREADS'])")
    assert launch.run(*QUICK, script, env={"OMP_NUM_THREADS": "9"}).stdout == "9\n"


def test_threads_share_the_cores(launch: Launch) -> None:
    script = launch.script("print(os.environ['OMP_NUM_THREADS'])")
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    processes = len(os.sched_getaffinity(0)) * 2
    result = launch.run(*QUICK, "--num_processes", str(processes), script, env=env)
    if "OMP_NUM_THREADS" not in os.environ:
        assert result.stdout == "1\n" * processes


def test_workers_get_the_whole_config(launch: Launch) -> None:
    script = launch.script("""
        from accel.config import current_config
        print(current_config().mixed_precision, current_config().data_seed)
    """)
    result = launch.run(*QUICK, "--mixed_precision", "bf16", "--data_seed", "7", script)
    assert result.stdout == "Choice(name='bf16', options={}) 7\n"


def test_a_config_that_accelerate_wrote(launch: Launch) -> None:
    file = launch.folder / "default_config.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nmixed_precision: bf16\n"
        "num_machines: 1\nnum_processes: 2\nuse_cpu: true\n"
    )
    script = launch.script("""
        from accel.config import current_config
        c = current_config()
        print(rank, c.num_processes, c.device.name, c.mixed_precision.name)
    """)
    result = launch.run("--config_file", file, *QUICK[1:], script)
    assert sorted(result.stdout.splitlines()) == ["0 2 cpu bf16", "1 2 cpu bf16"], result.stderr


def test_script_finds_what_python_gives_it(launch: Launch) -> None:
    launch.script("", "work/helper.py").write_text("value = 42\n")
    script = """
    import helper, pickle, __main__
    class Thing: pass
    print(sys.argv, sys.path[0] == os.path.dirname(os.path.realpath(__file__)), __name__, __file__, helper.value)
    print(type(pickle.loads(pickle.dumps(Thing()))) is Thing, __main__.Thing is Thing, __spec__)
    print(sys.stdin.read() == "")
    """
    path = launch.script(script, "work/script.py")
    result = launch.run(*QUICK, "work/script.py", "--lr", "3", "-m")
    told = f"['work/script.py', '--lr', '3', '-m'] True __main__ {path} 42\nTrue True None\nTrue\n"
    assert (result.stdout, result.stderr) == (told, "")


def test_module(launch: Launch) -> None:
    launch.script("", "package/__init__.py").write_text("")
    launch.script("from . import other; print(sys.argv, __spec__.name, __package__, sys.path[0])", "package/tool.py")
    launch.script("print('package')", "package/__main__.py")
    launch.script("", "package/other.py").write_text("")
    result = launch.run(*QUICK, "-m", "package.tool", "-x")
    file = str(launch.folder / "package" / "tool.py")
    assert (result.stdout, result.stderr) == (f"{[file, '-x']} package.tool package {launch.folder}\n", "")
    assert launch.run(*QUICK, "-m", "package").stdout == "package\n"


def test_nothing_of_the_current_folder_is_imported(launch: Launch) -> None:
    """As with `python elsewhere/script.py`, in the worker and also before it."""
    for name in ("tempfile.py", "yaml.py", "torch.py"):
        (launch.folder / name).write_text("raise SystemExit('imported from the current folder')")
    script = launch.script("import tempfile, torch; print('fine')", "elsewhere/script.py")
    result = launch.run("--cpu", script)
    assert (result.stdout, result.stderr) == ("fine\n", "")


def test_lines_of_several_workers_stay_whole(launch: Launch) -> None:
    script = launch.script("for i in range(500): print(rank, 'x' * 50, 'y' * 50)")
    result = launch.run(*QUICK, "--num_processes", "4", script)
    expected = {f"{rank} {'x' * 50} {'y' * 50}": 500 for rank in range(4)}
    assert Counter(result.stdout.splitlines()) == expected


def test_exit_runs_what_python_runs(launch: Launch) -> None:
    script = """
    import atexit, threading
    atexit.register(print, "atexit")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    sys.stdout.write("no newline, ")
    """
    result = launch.run(*QUICK, launch.script(script))
    assert (result.returncode, result.stdout) == (0, "no newline, thread\natexit\n")


def test_workers_draw_different_numbers(launch: Launch) -> None:
    script = launch.script("import numpy, random; print(numpy.random.rand(), random.random())")
    drawn = launch.run("--cpu", "--num_processes", "2", script).stdout.split()
    assert len(set(drawn)) == 4


LOADER = """
import torch
from torch.utils.data import DataLoader, Dataset
class Squares(Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return torch.tensor(i * i)
if __name__ == "__main__":
    for method in ("fork", "spawn"):
        loader = DataLoader(Squares(), batch_size=4, num_workers=2, multiprocessing_context=method)
        print(method, [batch.tolist() for batch in loader])
"""


def test_data_loaders_start_workers_of_their_own(launch: Launch) -> None:
    result = launch.run("--cpu", "--num_processes", "2", launch.script(LOADER))
    batches = "[[0, 1, 4, 9], [16, 25, 36, 49]]"
    assert (result.returncode, result.stderr) == (0, "")
    assert Counter(result.stdout.splitlines()) == {f"fork {batches}": 2, f"spawn {batches}": 2}


def test_input_is_the_first_workers(launch: Launch) -> None:
    script = launch.script("print(rank, sys.stdin.read())")
    (launch.folder / "typed").write_text("hello")
    run = launch.start(*QUICK, "--num_processes", "2", script, stdin=launch.folder / "typed")
    assert sorted(run.communicate(timeout=30)[0].splitlines()) == ["0 hello", "1 "]


def test_two_runs_at_once(launch: Launch) -> None:
    script = launch.script(REDUCE)
    runs = [launch.start("--cpu", "--num_processes", "2", script) for _ in range(3)]
    results = [run.communicate(timeout=60) for run in runs]
    assert results == [("total 3.0 2\n" * 2, "")] * 3


def test_ignored_signals_stay_ignored(launch: Launch) -> None:
    """As with `nohup`, or in the background of a script."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = launch.start(*QUICK, launch.script("mark('up'); time.sleep(1); print('done')"))
    finally:
        signal.signal(signal.SIGHUP, before)
    launch.pids("up", 1)
    run.send_signal(signal.SIGHUP)
    assert run.communicate(timeout=30) == ("done\n", "")
