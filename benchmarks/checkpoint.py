"""How long a checkpoint takes, beside the disk itself and what others write.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --megabytes 1000 --processes 1 2 4 --rounds 5 --folder /on/the/disk

The state is a model's weights and Adam's two moments. Ours is divided by zero3, as is that of torch's distributed
checkpoint; torch.save and Accelerate write a whole one from the first process. Rows take turns, round after round, and
what a row is compared with is measured right before it, so that what the machine does to one it does to the other.
Shown are medians of seconds and of ratios, and the least and the most ratio: the closer these are, the more the ratio
can be trusted. A row lasts from when the first process begins to when the last one ends.

Every save replaces the one before and is on disk before its time ends; ours deletes the one before behind the training,
which is a row of its own. A save behind the training copies the optimizer's state after it has returned: what the next
step waits for that is measured right after the save, and after a forward and a backward pass. `dd` writes a new file.

Loads are into models and optimizers that have been trained, from the disk, after the page cache was told to forget the
files, and from the page cache, as those loads have left them there. They are compared with the raw read and the copy:
all processes at once, each in one thread, read their shares of the bytes of our checkpoint into one small buffer, and
copy what they hold of the state to other memory. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.utils.data import DataLoader

from accel import Accelerator
from accel.runtime.world import World
from accel.testing import run

BUFFER = 1 << 20
LAYERS = 8
FLOATS = 3 * LAYERS
"""Matrices of the state: a weight and Adam's two moments for each layer."""

BATCHES = 10**6
"""How far into an epoch the resume is that is compared with one at its beginning."""


@dataclass(frozen=True)
class Row:
    """What is measured: all ranks call `act`. `files` are those whose place in the page cache matters."""

    name: str
    act: Callable[[], Any]
    base: Sequence[str] = ()
    """The rows with whose sum it is compared: their measurements just before it."""

    files: Path | None = None
    cached: bool = False
    before: Callable[[], Any] = lambda: None
    """What all ranks do before, untimed."""


class Contenders:
    """The state of each contender, and what it does with it; all ranks."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        world = World.from_environment()
        self.folder, self.megabytes = folder, megabytes
        self.width = max(int((megabytes * 1e6 / FLOATS / 4) ** 0.5) // 64, 1) * 64
        self.rank, self.processes = world.rank, world.size
        self.main, self.several = world.rank == 0, world.size > 1
        self.accelerator = Accelerator(strategies=["zero3"] if self.several else ["single"])
        self.model, self.optimizer = self._trained()
        self.accelerator.prepare(self.model, self.optimizer)
        self._step(self.model, self.optimizer)
        moments = {f"{i}.{k}": v for i, s in enumerate(self.optimizer.state.values()) for k, v in s.items()}
        self.state = {"model": self.model.state_dict(), "optimizer": moments}
        self.plain = self._trained()
        self._step(*self.plain)
        tensors = [t for named in self.state.values() for t in named.values()]
        self.local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
        self.copies = [t.clone() for t in self.local]
        self.weights = [torch.ones(1024, 1024, requires_grad=True) for _ in range(8)]

    def _trained(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(*[nn.Linear(self.width, self.width, bias=False) for _ in range(LAYERS)])
        return model, torch.optim.Adam(model.parameters())

    def compute(self) -> None:
        """Some 13 GFLOP on each process for 1 GB, in less time than a save takes."""
        x = torch.ones(max(self.megabytes // 4, 1), 1024, requires_grad=True)
        y = x
        for weight in self.weights:
            y = y @ weight
        y.sum().backward()

    def _step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.Adam.step(optimizer)
        optimizer.zero_grad()

    def rows(self) -> Iterator[Row]:
        """In the order in which they take turns."""
        ours, theirs, pt = (self.folder / name for name in ("accel", "dcp", "pt"))
        accelerator, alone = self.accelerator, not self.several
        checkpoints = accelerator._checkpoints
        behind = partial(accelerator.save_state, ours, blocking=False)

        def waiting() -> Any:
            return self.optimizer.state  # which waits for the copy, as a step does

        compute = Row("forward and backward", self.compute)
        dd = Row("dd, flushed", lambda: self.main and self.dd(), before=self.remove_raw)
        yield dd
        yield Row("accel save_state", lambda: accelerator.save_state(ours), [dd.name])
        yield Row("  stall if blocking=False", behind, ["accel save_state"], before=checkpoints.finish)
        yield Row("  a step right then would wait", waiting, ["accel save_state"])
        yield Row("  and the wait for it", checkpoints.wait)
        yield Row("  and the deletion of the one before", checkpoints.finish)
        yield compute
        yield Row("  while a save is written", self.compute, [compute.name], before=behind)
        yield Row("  what the step then waits", waiting, ["accel save_state"])
        yield Row("  and the wait for it, then", checkpoints.wait)
        yield replace(dd, before=lambda: (checkpoints.finish(), self.remove_raw()))
        yield Row("torch.save", lambda: self.main and self.torch_save(), [dd.name])
        yield dd
        yield Row("DCP", lambda: dcp.save(self.state, checkpoint_id=theirs, no_dist=alone), [dd.name])
        yield from self.beside_raw("accel load_state", lambda: accelerator.load_state(ours), ours)
        yield from self.beside_raw("torch.load", lambda: self.main and self.torch_load(), pt)
        load = partial(dcp.load, self.state, checkpoint_id=theirs, no_dist=alone)
        yield from self.beside_raw("DCP load", load, theirs)
        if importlib.util.find_spec("accelerate"):
            yield dd
            yield from self.accelerate()

    def beside_raw(self, name: str, load: Callable[[], Any], folder: Path) -> Iterator[Row]:
        """A load from disk and one from the page cache, each after the raw read of our checkpoint and the copy."""
        ours = self.folder / "accel"
        for cached, where in ((False, "disk"), (True, "page cache")):
            settle = partial(self.settle, ours) if not cached else lambda: None
            read, copy = Row(f"raw read, {where}", self.read, [], ours, cached, settle), Row("copy", self.copy)
            yield read
            yield copy
            yield Row(f"{name}, {where}", load, [read.name, copy.name], folder, cached)

    def accelerate(self) -> Iterator[Row]:
        """Hugging Face's library, over torch's DDP if there are several processes."""
        from accelerate import Accelerator as Peer

        peer, folder = Peer(cpu=True), self.folder / "accelerate"
        peer.prepare(*self.plain)

        def save() -> None:
            peer.save_state(str(folder))
            if self.main:
                flush(folder)

        yield Row("accelerate save_state", save, ["dd, flushed"])
        yield from self.beside_raw("accelerate load_state", lambda: peer.load_state(str(folder)), folder)

    def dd(self) -> None:
        """The disk alone: as many bytes into a new file, flushed."""
        raw = self.folder / "raw" / "file"
        raw.parent.mkdir(exist_ok=True)
        count = 4 * FLOATS * self.width**2 >> 20
        command = ["dd", "if=/dev/zero", f"of={raw}", "bs=1M", f"count={count}", "conv=fsync"]
        subprocess.run(command, check=True, capture_output=True)

    def remove_raw(self) -> None:
        if self.main:
            (self.folder / "raw" / "file").unlink(missing_ok=True)

    def read(self) -> None:
        """This process's share of each file of our checkpoint, into one buffer."""
        for path in filter(Path.is_file, (self.folder / "accel").rglob("*")):
            size = path.stat().st_size
            read(path, size * self.rank // self.processes, size * (self.rank + 1) // self.processes)

    def settle(self, folder: Path) -> None:
        """Let the disk come to an end with what was saved before: read what will be read, and forget it again."""
        if self.main:
            read_all(folder)
            forget(folder)
        if self.several:
            dist.barrier()

    def copy(self) -> None:
        """What this process holds of our state, into memory that is there."""
        for tensor, copy in zip(self.local, self.copies, strict=True):
            copy.copy_(tensor)

    def torch_save(self) -> None:
        model, optimizer = self.plain
        folder = self.folder / "pt"
        folder.mkdir(exist_ok=True)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "state.pt")
        flush(folder)

    def torch_load(self) -> None:
        model, optimizer = self.plain
        state = torch.load(self.folder / "pt" / "state.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])


def flush(folder: Path) -> None:
    """Wait until the files of a folder are on disk."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def read(path: Path, start: int, stop: int) -> None:
    """Read bytes of a file, into one buffer."""
    buffer = memoryview(bytearray(BUFFER))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while got := file.readinto(buffer[: stop - start]):
            start += got


def read_all(folder: Path) -> None:
    """Read all files of a folder."""
    for path in filter(Path.is_file, folder.rglob("*")):
        read(path, 0, path.stat().st_size)


def forget(folder: Path) -> None:
    """Let the page cache drop the files of a folder."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


Span = tuple[float, float, list[tuple[str, int]]]
"""When this process began and ended a row, in seconds, and which measurements of which rows it is compared with."""

Spans = dict[str, list[Span]]


def measure(folder: Path, megabytes: int, rounds: int) -> Spans:
    """Let the rows take turns, after a round that does not count; all ranks."""
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")  # that it overwrites, as it should here
    contenders = Contenders(folder, megabytes)
    spans: Spans = {}
    rows = list(contenders.rows())
    for count in range(rounds + 1):
        for row in rows:
            if row.files and contenders.main:
                (read_all if row.cached else forget)(row.files)
            row.before()
            start, stop = timed(row.act, contenders.several)
            if count:
                base = [(name, len(spans[name]) - 1) for name in row.base]
                spans.setdefault(row.name, []).append((start, stop, base))
    contenders.accelerator.end_training()
    return spans


def timed(act: Callable[[], Any], several: bool) -> tuple[float, float]:
    """When this process began and ended, by a clock that all processes share."""
    if several:
        dist.barrier()
    start = time.perf_counter()
    act()
    return start, time.perf_counter()


def seconds(ranks: Sequence[Spans]) -> dict[str, list[float]]:
    """From the begin of the first process to the end of the last, of each measurement of each row."""
    found = {}
    for name in ranks[0]:
        each = zip(*(spans[name] for spans in ranks), strict=True)
        found[name] = [max(stop for _, stop, _ in one) - min(start for start, _, _ in one) for one in each]
    return found


def resume(folder: Path, batch: int) -> float:
    """Seconds from `load_state` to the first batch, of a run that had come to this batch of a shuffled epoch."""
    accelerator = Accelerator()
    data: Any = range(BATCHES + 100)
    loader = accelerator.prepare(DataLoader(data, batch_size=1, shuffle=True))
    loader.load_state_dict({**loader.state_dict(), "samples": [batch]})
    accelerator.save_state(folder / "resume")

    def first() -> Tensor:
        accelerator.load_state(folder / "resume")
        found: Tensor = next(iter(loader))
        return found

    first()
    return statistics.median(stop - start for start, stop in (timed(first, False) for _ in range(5)))


def show(ranks: Sequence[Spans]) -> None:
    times = seconds(ranks)
    for name, spans in ranks[0].items():
        text = f"  {name:38} {statistics.median(times[name]):7.3f} s"
        if base := [row for row, _ in spans[0][2]]:
            sums = [sum(times[row][i] for row, i in beside) for _, _, beside in spans]
            ratios = [own / both for own, both in zip(times[name], sums, strict=True)]
            text += f"   {statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f}) x {' + '.join(base)}"
        print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the state over all processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    options = parser.parse_args()
    for count in options.processes:
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            ranks = run(count, measure, folder, options.megabytes, options.rounds, timeout=1800)
        finally:
            shutil.rmtree(folder)
        print(f"\n{count} processes, {options.megabytes} MB, {options.rounds} rounds: median; ratio (least to most)")
        show(ranks)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = {batch: run(1, resume, Path(folder), batch)[0] for batch in (0, BATCHES)}
    print(f"\nresume, from load_state to the first batch: {found[0]:.3f} s at batch 0, {found[BATCHES]:.3f} s at 10^6")


if __name__ == "__main__":
    main()
