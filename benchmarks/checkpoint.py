"""How long a checkpoint takes, beside the disk itself, torch.save and torch's distributed checkpoint.

    python benchmarks/checkpoint.py --megabytes 1000 --processes 1 2 4

The state is a model's weights and Adam's two moments. Rows take turns, round after round, so that what the machine
does to one it does to all, and each shows the median; every save is flushed to disk before its time ends. Loads come
from the page cache, as the raw read beside them does. `stall` is how long a save in the background holds training up.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from accel import Accelerator
from accel.testing import run

Row = tuple[str, Callable[[], Any]]


def prepared(megabytes: int) -> tuple[Accelerator, nn.Module, torch.optim.Optimizer]:
    """A divided model whose weights and optimizer state, over all processes, have this size."""
    size = int((megabytes * 1e6 / 4 / 3 / 8) ** 0.5)
    settings: dict[str, Any] = {"strategies": ["zero3"]}
    accelerator = Accelerator(num_processes=int(os.environ["WORLD_SIZE"]), **settings)
    model = nn.Sequential(*[nn.Linear(size, size, bias=False) for _ in range(8)])
    optimizer = torch.optim.Adam(model.parameters())
    accelerator.prepare(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam.step(optimizer)
    return accelerator, model, optimizer


def flushed(path: Path) -> None:
    """Wait until a file is on disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def raw_write(folder: Path, megabytes: int) -> None:
    """The disk alone: dd writes as many bytes and flushes them."""
    command = ["dd", "if=/dev/zero", f"of={folder}/raw", "bs=1M", f"count={int(megabytes * 1e6) >> 20}", "conv=fsync"]
    subprocess.run(command, check=True, capture_output=True)


def raw_read(folder: Path) -> None:
    """The same file, read into one buffer."""
    buffer = bytearray(16 << 20)
    with open(folder / "raw", "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def torch_save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "state.pt")
    flushed(folder / "state.pt")


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    moments = {f"{i}.{k}": v for i, s in enumerate(optimizer.state.values()) for k, v in s.items()}
    return {"model": model.state_dict(), "optimizer": moments}


def rows(folder: Path, megabytes: int) -> list[Row]:
    """What is measured; every rank calls each, and rank 0 alone does what only one process can."""
    accelerator, model, optimizer = prepared(megabytes)
    main = accelerator.is_main_process
    state = state_of(model, optimizer)

    def fresh_dcp() -> None:
        dcp.save(state, checkpoint_id=str(folder / "dcp"), no_dist=accelerator.num_processes == 1)

    found: list[Row] = [
        ("dd, flushed", lambda: raw_write(folder, megabytes) if main else None),
        ("accel save_state", lambda: accelerator.save_state(folder / "accel")),
        ("accel stall of a background save", lambda: accelerator.save_state(folder / "accel", blocking=False)),
        ("  and the wait for it", lambda: accelerator._checkpoints.wait()),
        ("torch distributed checkpoint", fresh_dcp),
        ("raw read", lambda: raw_read(folder) if main else None),
        ("accel load_state", lambda: accelerator.load_state(folder / "accel")),
        ("torch distributed checkpoint load", lambda: dcp.load(state, checkpoint_id=str(folder / "dcp"))),
    ]
    if accelerator.num_processes == 1:
        found.insert(4, ("torch.save, flushed", lambda: torch_save(model, optimizer, folder)))
        found[-1] = (found[-1][0], lambda: dcp.load(state, checkpoint_id=str(folder / "dcp"), no_dist=True))
    return found


def measure(folder: Path, megabytes: int, rounds: int) -> dict[str, float]:
    """The median seconds of each row over the rounds, after one that does not count; all ranks."""
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")  # that it overwrites, as it should here
    several = int(os.environ["WORLD_SIZE"]) > 1
    times: dict[str, list[float]] = {}
    for count in range(rounds + 1):
        for name, act in rows_once(folder, megabytes):
            if several:
                dist.barrier()
            start = time.perf_counter()
            act()
            if several:
                dist.barrier()
            if count:
                times.setdefault(name, []).append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


_ROWS: list[Row] = []


def rows_once(folder: Path, megabytes: int) -> list[Row]:
    """The rows of this process, made once."""
    if not _ROWS:
        _ROWS.extend(rows(folder, megabytes))
    return _ROWS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the state over all processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    options = parser.parse_args()
    for count in options.processes:
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            [times, *_] = run(count, measure, folder, options.megabytes, options.rounds, timeout=1800)
        finally:
            shutil.rmtree(folder)
        print(f"\n{count} processes, {options.megabytes} MB, median of {options.rounds} rounds")
        for name, seconds in times.items():
            print(f"  {name:36} {seconds:7.3f} s  {options.megabytes / 1000 / seconds:6.2f} GB/s")


if __name__ == "__main__":
    main()
