"""How long a user waits before anything happens.

    python benchmarks/startup.py

Commands take turns, round after round, and a row shows medians: wall-clock seconds, CPU seconds of all processes,
and the median of the round-by-round ratio to the first row of its table. The first collective is an all-reduce of
one number in a script that knows torch alone, the same under every launcher; it ends the clock. Peers that are not
installed are left out (`pip install 'accel-torch[bench]'`).
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

FIRST_COLLECTIVE = """
import os, time
import torch
import torch.distributed as dist
alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
dist.init_process_group("gloo", **alone)
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 0:
    open(os.environ["CLOCK"], "w").write(f"{time.time()!r} {dist.get_world_size()}")
dist.barrier()
dist.destroy_process_group()
"""

Row = tuple[str, list[str]]


def scripts(name: str) -> str | None:
    """A console script of this very environment."""
    return shutil.which(name, path=sysconfig.get_path("scripts"))


def commands() -> list[Row]:
    """What answers at once, or should."""
    rows = [("accel --help", ["accel", "--help"]), ("accel plugins", ["accel", "plugins"])]
    rows += [("accelerate --help", ["accelerate", "--help"])]
    found: list[Row] = [(title, [path, *rest]) for title, (name, *rest) in rows if (path := scripts(name))]
    python = [sys.executable, "-c"]
    return [("python -c pass", [*python, "pass"]), ("import accel", [*python, "import accel"]), *found]


def launches(processes: int, script: Path) -> list[Row]:
    """The same script on so many processes, by each launcher."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    rows: list[Row] = [(f"torchrun, {processes}", [*torchrun, str(script)])]
    if accel := scripts("accel"):
        rows.append(
            (f"accel launch, {processes}", [accel, "launch", "--cpu", f"--num_processes={processes}", str(script)])
        )
    if accelerate := scripts("accelerate"):
        flags = [
            "--cpu",
            f"--num_processes={processes}",
            "--num_machines=1",
            "--mixed_precision=no",
            "--dynamo_backend=no",
        ]
        rows.append((f"accelerate launch, {processes}", [accelerate, "launch", *flags, str(script)]))
    return rows


def measure(command: list[str], folder: Path) -> tuple[float, float, int]:
    """Wall-clock seconds, up to the first collective if there is one, CPU seconds, and the size of the world."""
    clock = folder / "clock"
    clock.unlink(missing_ok=True)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    done = subprocess.run(
        command,
        env={**os.environ, "CLOCK": str(clock), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr}")
    end, size = clock.read_text().split() if clock.exists() else (time.time(), 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return float(end) - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, int(size)


def table(rows: list[Row], rounds: int, folder: Path) -> None:
    """Run the commands in turn and print a line for each."""
    results: dict[str, list[tuple[float, float, int]]] = {title: [] for title, _ in rows}
    for _ in range(rounds):
        for title, command in rows:
            results[title].append(measure(command, folder))
    first = results[rows[0][0]]
    for title, found in results.items():
        wall, cpu, size = (statistics.median(column) for column in zip(*found, strict=True))
        ratio = statistics.median(mine[0] / other[0] for mine, other in zip(found, first, strict=True))
        note = f"   (started a world of {size})" if size != first[0][2] else ""
        print(f"{title:24}{wall:9.3f}{cpu:9.3f}{ratio:9.2f}{note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of turns")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4], help="sizes of the launched worlds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        script = Path(name) / "first_collective.py"
        script.write_text(FIRST_COLLECTIVE)
        print(f"seconds, median of {options.rounds} rounds\n{'':24}{'wall':>9}{'cpu':>9}{'ratio':>9}")
        table(commands(), options.rounds, Path(name))
        for processes in options.processes:
            print()
            table(launches(processes, script), options.rounds, Path(name))


if __name__ == "__main__":
    main()
