"""The checkpoints of a run: saving in the foreground or behind it, loading the newest, deleting the old."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ... import storage
from ...errors import CheckpointError, DamagedError
from ...interfaces import Checkpoint
from ...storage import Manifest, Range
from ..exits import fail_at_exit
from ..lines import warn
from ..world import World
from .background import Background
from .contents import Contents, State, collect, collect_model
from .exchange import Exchange
from .fit import Differences
from .load import Skipped, load, load_weights, plan_weights
from .read import Parts
from .snapshot import Snapshot
from .write import Layout, Work, plan, plan_layout, plan_work, write


class Checkpoints:
    """Writes and reads the checkpoints of a run. Each method is called by all ranks together.

    `home` is where those without a name of the user's are; of these, the newest `limit` are kept, or all.
    """

    def __init__(self, format: Checkpoint, world: World, home: Path, limit: int | None, timeout: float) -> None:
        self.format, self.world, self.home, self.limit = format, world, home, limit
        self.exchange = Exchange(world, timeout)
        self._writing = Background("accel-checkpoint", "the checkpoint begun before was not written")
        self._deleting = Background("accel-deletion", "an old checkpoint was not deleted")
        self._buffers: dict[str, Tensor] = {}
        self._layout: Layout | None = None

    def save(self, folder: Path | None, state: State, blocking: bool) -> Path:
        """Write a checkpoint; returns its folder. Not blocking, it returns once what may change has been copied."""
        self.wait()
        self.exchange.connect()
        numbered = folder is None
        folder = folder or self.exchange.from_main(lambda: storage.next_folder(self.home))
        contents = collect(state)
        snapshot = None if blocking else Snapshot(state, self._buffers)
        copy = snapshot.take if snapshot else None
        work, self._layout = plan(folder, contents, state, self.format, self.exchange, self._layout, copy)
        atexit.unregister(self._finish_at_exit)
        atexit.register(self._finish_at_exit)  # before the process group is left, since it comes after that in the list
        facts = {"step": state.step, "created": round(time.time(), 3), "processes": self.world.size}
        if snapshot is None:
            self._write(work, facts, numbered)
        else:
            snapshot.copy("small", work.small)
            snapshot.hold()
            self._writing.start(lambda: self._complete_and_write(snapshot, work, facts, numbered))
        return folder

    def exist(self) -> bool:
        """Whether there are checkpoints without a name of the user's, complete or not."""
        self.wait()
        self.exchange.connect()
        return self.exchange.from_main(lambda: bool(storage.newest_first(self.home)))

    def load(self, folder: Path | None, state: State, strict: bool) -> tuple[Path, Skipped]:
        """Take over a checkpoint, by default the newest complete one; returns its folder and what was skipped."""
        self.wait()
        self.exchange.connect()
        if folder is None:
            return self._load_newest(state, strict)
        return load(folder, state, self.format, self.exchange, strict)

    def fill(self, state: dict[str, Any]) -> None:
        """Replace what is on the meta device in a state dict, as others hold it, by copies of theirs."""
        self.wait()
        self.exchange.connect()
        self.exchange.fill(state)

    def save_model(self, folder: Path, model: nn.Module, largest: int) -> None:
        """Write a model's weights alone, into a folder that may hold other files."""
        self.wait()
        self.exchange.connect()
        contents = Contents()
        collect_model(contents, 0, model)
        tables, rank = self.exchange.together(contents.table), self.world.rank
        work = plan_work(folder / "model", plan_layout(tables, ["model"], self.format, largest, rank), contents, rank)
        write(work, lambda ranges: storage.commit_files(folder, folder / "model", "model"), self.exchange)

    def load_model(self, folder: Path, model: nn.Module, strict: bool) -> Differences:
        """Take over weights, from one of our checkpoints or from any folder that the format reads."""
        self.wait()
        self.exchange.connect()
        return load_weights(folder, model, self.format, self.exchange, strict)

    def compare_model(self, folder: Path, model: nn.Module, strict: bool) -> Differences:
        """What `load_model` will leave as it is; raises CheckpointError as it does. All ranks."""
        self.wait()
        self.exchange.connect()
        return plan_weights(Parts(folder), model, self.format, self.exchange, strict)[1]

    def wait(self) -> None:
        """Until what is being written is on disk. Raises CheckpointError if it could not be written."""
        self._writing.wait()

    def finish(self) -> None:
        """Until nothing is being done behind the training. Raises CheckpointError, for deletions on rank 0 only."""
        self._writing.wait()
        self._deleting.wait()

    def forget(self) -> None:
        """Give back the memory for snapshots; one that is being written keeps its own until it is."""
        self._buffers.clear()
        self._layout = None

    def _write(self, work: Work, facts: dict[str, Any], numbered: bool) -> None:
        def finish(ranges: Sequence[Range]) -> None:
            manifest = Manifest({file.name: file.size for file in work.files}, ranges, facts)
            manifest.write(storage.aside(work.folder))
            storage.complete(storage.aside(work.folder))  # somebody may have deleted files meanwhile
            replaced = storage.commit(work.folder)
            old = storage.rotate(self.home, self.limit) if numbered and self.limit is not None else []
            self._deleting.start(partial(_clear_up, replaced, old))

        write(work, finish, self.exchange, begin=self._deleting.wait)

    def _complete_and_write(self, snapshot: Snapshot, work: Work, facts: dict[str, Any], numbered: bool) -> None:
        together = partial(self.exchange.gather, None)  # who still copies weights is to have the memory for it
        self.exchange.each(lambda: snapshot.complete(together))
        self._write(work, facts, numbered)

    def _finish_at_exit(self) -> None:
        try:
            self.finish()
        except CheckpointError as error:
            fail_at_exit(error)

    def _load_newest(self, state: State, strict: bool) -> tuple[Path, Skipped]:
        """Take over the newest checkpoint that is whole. Raises CheckpointError telling why each was passed over."""
        passed = []
        for folder in self.exchange.from_main(lambda: storage.newest_first(self.home)):
            try:
                return load(folder, state, self.format, self.exchange, strict)
            except DamagedError as error:
                passed.append(str(error))
                if self.world.rank == 0:
                    warn(f"load_state: passed over {os.fspath(folder)}: {error}")
        why = "; passed over " + "; ".join(passed) if passed else "; save_state() writes one"
        raise CheckpointError(f"{self.home}: no complete checkpoint{why}")


def _clear_up(replaced: Sequence[Path], old: Sequence[Path]) -> None:
    """Delete what a checkpoint has replaced and what was rotated out. Raises CheckpointError for the latter."""
    storage.clear(replaced)
    storage.delete(old)
