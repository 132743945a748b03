"""Several machines: `accel launch` once for each, here all on one."""

from __future__ import annotations

import socket

import pytest

from accel.launch.rendezvous import free_port

from .conftest import Launch, running, wait_until

SCRIPT = """
mark("up")
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
print(os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"], total.item())
if rank >= 2:
    time.sleep(0.5)  # machine 0 has nothing more to do now, but this needs its store
    dist.new_group([2, 3], use_local_synchronization=True)
"""


def flags(port: int | None = None, machine_rank: int = 0, machines: int = 2, timeout: float = 60) -> list[str]:
    told = ["--cpu", "--num_processes", str(2 * machines), "--num_machines", str(machines)]
    told += ["--machine_rank", str(machine_rank), "--launcher", f"{{local: {{timeout: {timeout}}}}}"]
    return told + (["--main_process_port", str(port)] if port else [])


def test_one_world_over_machines(launch: Launch) -> None:
    port, script = free_port(), launch.script(SCRIPT)
    other = launch.start(*flags(port, 1), script)
    first = launch.run(*flags(port, 0), script)
    assert (first.returncode, first.stderr) == (0, "")
    assert sorted(first.stdout.splitlines()) == ["0 2 10.0", "1 2 10.0"]
    out, error = other.communicate(timeout=30)
    assert (other.returncode, error, sorted(out.splitlines())) == (0, "", ["0 2 10.0", "1 2 10.0"])


def test_a_failure_ends_all_machines(launch: Launch) -> None:
    port = free_port()
    source = (
        "import torch.distributed as d\nd.init_process_group('gloo')\nmark('up')\nrank == 3 and 1 / 0\nd.barrier()\n"
    )
    script = launch.script(source)
    first = launch.start(*flags(port, 0), script)
    other = launch.run(*flags(port, 1), script)
    assert other.returncode == 1 and "ZeroDivisionError" in other.stderr
    first.communicate(timeout=60)
    assert first.returncode == 1
    assert running(launch.pids("up", 4)) == []


@pytest.mark.parametrize("dry", [["--dry_run"], []])
def test_port_must_be_given(launch: Launch, dry: list[str]) -> None:
    result = launch.run(*flags(), *dry, launch.script(SCRIPT))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("accel: main_process_port: needed with num_machines 2")


def test_missing_machine(launch: Launch) -> None:
    result = launch.run(*flags(free_port(), timeout=1), launch.script(SCRIPT))
    assert result.returncode == 1
    assert "accel: num_machines: after 1 s, of 2 machines these have not come to 127.0.0.1:" in result.stderr
    assert ": 1; run `accel launch --machine_rank N` on each" in result.stderr and "Traceback" not in result.stderr
    assert list(launch.folder.glob("up.*")) == []


def test_missing_machine_0(launch: Launch) -> None:
    port = free_port()
    result = launch.run(*flags(port, 1, timeout=1), launch.script(SCRIPT))
    assert result.returncode == 1
    assert f"main_process_ip: nothing answers at 127.0.0.1:{port} after 1 s" in result.stderr


def test_two_machines_of_one_rank(launch: Launch) -> None:
    port, script = free_port(), launch.script(SCRIPT)
    launch.start(*flags(port, 0, machines=3), script)
    others = [launch.start(*flags(port, 1, machines=3), script) for _ in range(2)]
    wait_until(lambda: any(other.poll() is not None for other in others))
    errors = [other.communicate()[1] for other in others if other.poll() is not None]
    assert all("machine_rank: more than one machine was started as 1" in error for error in errors)


def test_machines_that_were_told_different_numbers(launch: Launch) -> None:
    port, script = free_port(), launch.script(SCRIPT)
    first = launch.start(*flags(port, 0, machines=3, timeout=20), script)
    result = launch.run(*flags(port, 1, machines=2, timeout=20), script)
    told = result.stderr + first.communicate(timeout=60)[1] if "another one" not in result.stderr else result.stderr
    assert "4 processes on 2 machines" in told and "6 processes on 3 machines" in told


def test_port_in_use(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = launch.run("--cpu", "--main_process_port", str(port), launch.script(SCRIPT))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"accel: main_process_port: cannot listen at 127.0.0.1:{port}: Address already in use\n"
