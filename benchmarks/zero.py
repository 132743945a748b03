"""What the stages of ZeRO cost and save, beside plain torch and the peers.

    python benchmarks/zero.py
    python benchmarks/zero.py --width 1024 --heads 16 --layers 11 --length 32 --batch 1   # states dominate

Contenders train one transformer in float32 with AdamW on gloo processes. Each has a group of processes of its own,
started by torchrun in one environment, that of `accel launch` on a CPU; where this is run by root, also in a network
of its own, whose loopback device counts every byte that is sent. Without that, bytes are the least that the
collectives called would have to send. They take turns, round after round, and rows show medians; ratios are to plain
torch's of the same round. Peers that are not installed are left out.

- CPU: milliseconds of CPU time of one process's step, user and system, all threads.
- sent: MB per step, all processes together, protocol included.
- stored: MB of parameters, gradients and optimizer state on one process, between backward and step; beside it the
  ratio to the formula of the ZeRO paper (stage 0 for DDP, 3 for FSDP2).
- peak: MB of resident memory above that before the model is made, in steps, and in making it all with two steps.
- loss: the largest relative difference to plain DDP's losses.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformer import Formula, Shape, count

from accel.launch.environment import ALLOCATOR

ROWS = {
    ("torch_ddp", "ddp"): 0,
    ("torch_fsdp2", "zero2"): 3,
    ("torch_fsdp2", "zero3"): 3,
    ("accel", "ddp"): 0,
    ("accel", "zero1"): 1,
    ("accel", "zero2"): 2,
    ("accel", "zero3"): 3,
    ("accelerate", "ddp"): 0,
    ("accelerate", "fsdp2"): 3,
    ("lightning_fabric", "ddp"): 0,
    ("lightning_fabric", "fsdp2"): 3,
    ("deepspeed", "zero1"): 1,
    ("deepspeed", "zero2"): 2,
    ("deepspeed", "zero3"): 3,
}
"""Contenders, what each is asked for, and the stage whose formula it is held against.

FSDP2 as `zero2` does not free parameters after forward; between steps it stores as little as stage 3.
"""

BASE, SHARDED = ("torch_ddp", "ddp"), ("torch_fsdp2", "zero3")
MB = 1e6
Results = list[dict[str, Any]]
"""What each process measured."""


def environment() -> dict[str, str]:
    """One for all: one thread per process, and memory that goes back to the system when it is freed."""
    given = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false", **ALLOCATOR}
    return {**os.environ, **given}


def own_network() -> list[str]:
    """The command to put before another to give it a network of its own; none if this user may not."""
    command = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if not (shutil.which("unshare") and shutil.which("ip")):
        return []
    allowed = subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if allowed else []


def measure(row: tuple[str, str], processes: int, shape: Shape, steps: int, network: list[str]) -> Results | str:
    """Train one contender; returns what each process measured, or the last line of what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        worker = [str(Path(__file__).parent / "zero_contender.py"), *row, "--out", str(out), "--steps", str(steps)]
        worker += ["--shape", json.dumps(dataclasses.asdict(shape)), *(["--own-network"] if network else [])]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        said = run([*network, *torchrun, *worker])
        if out.exists():
            results: Results = json.loads(out.read_text())
            return results
        errors = [line for line in said.splitlines() if "Error: " in line]
        return (errors or ["no result"])[0].strip()[-100:]


def run(command: list[str], seconds: float = 600) -> str:
    """Run a command and all that it starts; returns what it printed."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment(), start_new_session=True, **pipes) as process:
        try:
            said: str = process.communicate(timeout=seconds)[0]
            return said
        except subprocess.TimeoutExpired:
            return f"TimeoutError: nothing after {seconds:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def mean(results: Results, name: str) -> float:
    return float(statistics.mean(result[name] for result in results))


def losses(results: Results) -> list[float]:
    """Of the whole batch, step by step."""
    return [statistics.mean(step) for step in zip(*(result["losses"] for result in results), strict=True)]


Rounds = list[dict[tuple[str, str], Results]]


def ratio(rounds: Rounds, row: tuple[str, str], to: tuple[str, str], name: str) -> float:
    """The median over the rounds of a row's number over another row's."""
    return statistics.median([mean(found[row], name) / mean(found[to], name) for found in rounds] or [float("nan")])


def columns(rounds: Rounds, row: tuple[str, str], processes: int, parameters: int) -> list[str]:
    """One row of the table."""
    formula = Formula(ROWS[row], parameters, processes)

    def number(name: str) -> float:
        return statistics.median(mean(found[row], name) for found in rounds)

    weights, gradients, states = (number(name) for name in ("weights", "gradients", "states"))
    stored = weights + gradients + states
    pairs = zip(losses(rounds[0][row]), losses(rounds[0][BASE]), strict=True)
    return [
        " ".join(row),
        f"{number('cpu'):.0f}",
        f"{ratio(rounds, row, BASE, 'cpu'):.2f}",
        f"{ratio(rounds, row, SHARDED, 'cpu'):.2f}",
        f"{number('sent') / MB:.0f}",
        f"{ratio(rounds, row, BASE, 'sent'):.3f}",
        f"{weights / MB:.0f} + {gradients / MB:.0f} + {states / MB:.0f}",
        f"{formula.stored / MB:.0f}",
        f"{stored / formula.stored:.3f}",
        f"{number('peak') / MB:.0f}",
        f"{number('built') / MB:.0f}",
        f"{max(abs(a - b) / abs(b) for a, b in pairs):.0e}",
    ]


TITLES = [
    "contender",
    "CPU",
    "/ DDP",
    "/ FSDP2",
    "sent",
    "/ DDP",
    "stored",
    "formula",
    "ratio",
    "peak",
    "with making",
    "loss",
]


def show(rows: list[list[str]]) -> None:
    """Print rows as a table in markdown."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print("|", " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of turns")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a turn")
    parser.add_argument("--only", nargs="+", default=list(dict.fromkeys(name for name, _ in ROWS)), help="contenders")
    options = parser.parse_args()
    shape = Shape(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Shape)})
    network = own_network()
    wanted = {BASE[0], SHARDED[0], *options.only}
    installed = {n for n in wanted if n.startswith("torch_") or importlib.util.find_spec(n)}
    print("bytes: counted by the loopback device" if network else "bytes: the least that the collectives need")
    for name in sorted(wanted - installed):
        print(f"{name} is not installed and left out")
    for processes in options.processes:
        compare([row for row in ROWS if row[0] in installed], processes, shape, options, network)


def compare(rows: list[tuple[str, str]], processes: int, shape: Shape, options: Any, network: list[str]) -> None:
    """Measure all contenders on so many processes, and print the table."""
    rounds: Rounds = []
    failed: dict[tuple[str, str], str] = {}
    for _ in range(options.rounds):
        found = {row: measure(row, processes, shape, options.steps, network) for row in rows if row not in failed}
        failed |= {row: result for row, result in found.items() if isinstance(result, str)}
        rounds.append({row: result for row, result in found.items() if not isinstance(result, str)})
    parameters = count(shape)
    print(
        f"\n{parameters / 1e6:.1f} M parameters, {processes} processes, "
        f"{options.rounds} round(s) of {options.steps} steps"
    )
    for row, reason in failed.items():
        print(f"{' '.join(row)} failed: {reason}")
    if BASE not in failed and SHARDED not in failed:
        show([TITLES, *(columns(rounds, row, processes, parameters) for row in rows if row not in failed)])
    sys.stdout.flush()


if __name__ == "__main__":
    main()
