"""Checkpoints as a loop sees them: saved, loaded, resumed from, and written in time before the run is ended."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

from ..errors import ConfigError, PrepareError
from ..interfaces import Tracker
from ..interfaces.launcher import PREEMPTED
from ..plan import Plan
from ..storage import FOLDER, absolute, parse_size
from .checkpoint import Checkpoints, Differences, Pickled, State, group_of
from .deferred import is_empty
from .lines import warn
from .model import model_part, whole_state_dict
from .points import meet, meeting
from .preemption import SIGNALS, Preemption
from .training import Training


class Saving(Training):
    """The part of an `Accelerator` that writes and reads checkpoints."""

    plan: Plan
    trackers: dict[str, Tracker]

    def __init__(self) -> None:
        self._schedulers: list[LRScheduler] = []
        self._registered: list[Any] = []
        self._waiting: WeakKeyDictionary[nn.Module, list[tuple[Path, bool]]] = WeakKeyDictionary()
        self._checkpoints = self._make_checkpoints()
        self._preemption = self._watch_for_preemption()
        super().__init__()

    def get_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The whole state of a model under the user's own names, as plain CPU tensors.

        All ranks call it, unless each holds the whole model.
        """
        if self._scattered or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            meet("accelerator.get_state_dict")
        state = whole_state_dict(model)
        if self._scattered:
            self._checkpoints.fill(state)
        return state

    def register_for_checkpointing(self, *objects: Any, pickle: bool = False) -> None:
        """Let `save_state` and `load_state` keep these objects too; each has `state_dict` and `load_state_dict`.

        Their state is made of tensors, numbers, text, lists, tuples and dicts. With `pickle` it may be anything that
        can be pickled; loading a pickle can run any code, so have it only for checkpoints that you trust.
        """
        for value in objects:
            if not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict")):
                raise PrepareError(
                    f"register_for_checkpointing: expected an object with state_dict() and load_state_dict(), "
                    f"got {type(value).__name__}"
                )
        self._registered.extend(map(Pickled, objects) if pickle else objects)

    @meeting
    def save_state(self, output_dir: str | os.PathLike[str] | None = None, *, blocking: bool = True) -> str:
        """Write a checkpoint of everything prepared and registered; all ranks. Returns the folder.

        Without a folder it is `project_dir/checkpoints/checkpoint_<n>`, and those beyond `total_limit` are deleted.
        Each process writes what it holds. The folder appears whole or not at all: it is written aside, flushed,
        and renamed into place. In the middle of an accumulation window it is the state at the window's start, since
        a checkpoint holds no gradients; what was registered is saved as it is. With `blocking=False` training goes
        on as soon as the weights have been copied: they may be changed at once. Optimizer state is copied behind the
        next forward and backward; a step that comes before it is done waits, and state that is changed otherwise is
        an error. What goes wrong later is raised by the next call, or when the run ends. Raises CheckpointError on all
        ranks.
        """
        folder = None if output_dir is None else absolute(output_dir)
        return str(self._checkpoints.save(folder, self._state(), blocking))

    @meeting
    def load_state(self, input_dir: str | os.PathLike[str] | None = None, *, strict: bool = True) -> str:
        """Take over a checkpoint that `save_state` wrote; all ranks, with the same objects prepared.

        Any strategy and number of processes will do. Without a folder it is the newest complete one under
        `project_dir/checkpoints`; a warning tells which were passed over and why. Returns the folder. Raises
        CheckpointError if it is missing, damaged, or belongs to other objects; with `strict=False`, parameters
        that do not fit are left as they are, and a warning names them.
        """
        folder = None if input_dir is None else absolute(input_dir)
        folder, skipped = self._checkpoints.load(folder, self._state(), strict)
        for group, differences in skipped.items():
            self._warn(f"load_state: left out of {folder}: {group}: {differences.describe()}")
        for index, part in enumerate(self._models):
            left = skipped.get(group_of("model", index))
            part.filled_but(left.untouched if left else ())
        self._abandon_windows()
        return str(folder)

    @meeting
    def resume(self) -> bool:
        """Go on from the newest complete checkpoint under `project_dir`, if there is one; all ranks.

        Returns whether there was. Those that preemption saved are there, and those that the script saved without a
        name of its own. Raises CheckpointError as `load_state` does.
        """
        if not self._checkpoints.exist():
            return False
        self.load_state()
        return True

    @meeting
    def save_model(
        self,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write a model's weights as safetensors under the user's own names, as the Hugging Face tools do; all ranks.

        `max_shard_size` is in bytes, or with a unit as in "500MB". Each process writes what it holds.
        """
        if not safe_serialization:
            raise ConfigError("save_model: safe_serialization: False would write a pickle; it can only be True")
        self._checkpoints.save_model(absolute(save_directory), model, parse_size(max_shard_size))

    @meeting
    def load_model(self, model: nn.Module, directory: str | os.PathLike[str], strict: bool = True) -> Differences:
        """Take over weights from a folder of safetensors, whoever wrote it, into a prepared model; all ranks.

        Each process reads only its parts. Returns what did not fit; raises CheckpointError for it if `strict`. A model
        made under `empty_init` may be given before it is prepared: the weights are read when it is.
        """
        folder, part = absolute(directory), model_part(model)
        if part is None and any(map(is_empty, model.parameters())):
            differences = self._checkpoints.compare_model(folder, model, strict)
            self._waiting.setdefault(model, []).append((folder, strict))
        else:
            differences = self._checkpoints.load_model(folder, model, strict)
        if part is not None:
            part.filled_but(differences.untouched)
        if differences:
            self._warn(f"load_model: left out of {folder}: {differences.describe()}")
        return differences

    def _load_waiting(self, model: nn.Module) -> set[str]:
        """Load weights that were asked for while the model had no memory; returns the names of its parameters."""
        names = {name for name, _ in model.named_parameters()}
        loaded = set[str]()
        for directory, strict in self._waiting.pop(model, []):
            loaded |= names.difference(self._checkpoints.load_model(directory, model, strict).untouched)
        return loaded

    def _make_checkpoints(self) -> Checkpoints:
        format = self.plan.checkpoint.plugin(self.plan.checkpoint.options)
        home = Path(self.config.project_dir, FOLDER).absolute()  # also when the script has gone elsewhere
        return Checkpoints(format, self.world, home, self.config.total_limit, self.config.timeout)

    def _watch_for_preemption(self) -> Preemption | None:
        """Hear signals and watch the clock, if the config says so."""
        if not self.config.save_on_signal and self.config.time_limit is None:
            return None
        signals = SIGNALS if self.config.save_on_signal else ()
        preemption = Preemption(self.world, signals, self.config.time_limit, self.config.timeout)
        atexit.register(preemption.close)
        return preemption

    def _reached(self) -> Callable[[], None] | None:
        return self._stop_if_preempted if self._preemption else None

    def _stop_if_preempted(self) -> None:
        """Save and exit, if this is the step boundary at which all ranks do."""
        if self._preemption and self._preemption.due():
            folder = self.save_state()
            self._finish_trackers()
            if self.is_main_process:
                print(f"accel: {self._preemption.reason}: saved {folder}, exit code {PREEMPTED}", file=sys.stderr)
            raise SystemExit(PREEMPTED)

    def _finish_trackers(self) -> None:
        for tracker in self.trackers.values():
            tracker.finish()
        self.trackers.clear()

    def _warn(self, text: str) -> None:
        if self.is_main_process:
            warn(text)

    def _state(self) -> State:
        return State(
            models=[part.model for part in self._models],
            optimizers=[part.optimizer for part in self._optimizers],
            schedulers=self._schedulers,
            loaders=self._loaders,
            registered=self._registered,
            precision=self.precision,
            device=self.device,
            config=self.config.values(),
            positions=self._boundaries.positions,
            generators=self._boundaries.generators,
        )
