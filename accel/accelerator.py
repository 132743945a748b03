"""`Accelerator`: builds the parts that the config names and lays them around a training loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from .config import Config, current_config
from .errors import ConfigError, LaunchError, PrepareError
from .interfaces import Axis, Device, Precision, Strategy, Support, Tracker
from .plan import Plan
from .runtime import collectives
from .runtime.describe import Description, describe
from .runtime.lines import warn
from .runtime.loader import PreparedLoader
from .runtime.loader import skip_first_batches as _skip_first_batches
from .runtime.mesh import Mesh
from .runtime.metrics import gather_for_metrics
from .runtime.points import meeting
from .runtime.saving import Saving
from .runtime.scheduler import prepare_scheduler
from .runtime.world import World, leave


class Accelerator(Saving):
    """Everything a process needs to take its part in a run.

    Accelerator()                          # what `accel launch` says, else the defaults
    Accelerator(mixed_precision="bf16")    # the same, but for one setting

    All ranks make one, with the same settings. Raises ConfigError for settings that cannot be.
    """

    def __init__(self, config: Config | None = None, **settings: Any) -> None:
        self.world = World.from_environment()
        self.config = (config or current_config()).replace(**settings)
        self._check_world()
        self.plan = Plan.of(self.config)
        device = self.plan.find_device()
        self.hardware: Device = device.plugin()
        self.device = self.hardware.select(self.world.local_rank)
        self.mesh = Mesh(self.plan.sizes, self.world, self.device.type, self._connect)
        if self.world.size > 1:
            self._connect()
        self.precision: Precision = self.plan.precision.plugin(self.plan.precision.options, self.device)
        self._check_precision()
        self.strategies: list[Strategy] = [
            part.plugin(part.options, self.mesh.axis(axis), self.device, self.precision)
            for axis, part in self.plan.strategies.items()
        ]
        self.trackers: dict[str, Tracker] = {}
        self._trigger = False
        super().__init__()

    def prepare(self, *objects: Any, device_placement: Any = None) -> Any:
        """Make models, optimizers, loaders and schedulers ready for this run; all ranks, in the same order.

        Takes any number in any order, in one call or several, and returns them in the same order. Models,
        optimizers and schedulers are changed in place and stay of their own classes; a loader comes back as a
        new loader over this process's share. Raises PrepareError for what cannot be trained right.
        """
        for value in objects:
            _check_kind(value)
        for value in objects:
            if isinstance(value, nn.Module):
                self.prepare_model(value)
        results = tuple(self._prepare_other(value) for value in objects)
        return results if len(results) != 1 else results[0]

    def prepare_data_loader(self, loader: DataLoader[Any]) -> PreparedLoader:
        """A loader over this process's share of the batches, on its device."""
        if isinstance(loader, PreparedLoader):
            return loader
        data = self.mesh.axis(Axis.DATA)
        prepared = PreparedLoader(
            loader,
            size=data.size,
            index=data.index,
            device=self.device,
            config=self.config,
            group=lambda: data.group,
            active=self._active,
            asked=self._boundaries.asked,
        )
        self._loaders.append(prepared)
        return prepared

    def prepare_scheduler(self, scheduler: LRScheduler) -> LRScheduler:
        """Prepare one learning-rate scheduler, in place: it moves on only when its optimizer really steps."""
        if not any(scheduler is known for known in self._schedulers):
            self._schedulers.append(prepare_scheduler(scheduler))
        return scheduler

    def _prepare_other(self, value: Any) -> Any:
        if isinstance(value, Optimizer):
            return self.prepare_optimizer(value)
        if isinstance(value, DataLoader):
            return self.prepare_data_loader(value)
        if isinstance(value, LRScheduler):
            return self.prepare_scheduler(value)
        return value

    def skip_first_batches(self, loader: PreparedLoader, num_batches: int = 0) -> PreparedLoader:
        """A view of a prepared loader whose next epoch starts at batch `num_batches`, without reading those before."""
        return _skip_first_batches(loader, num_batches)

    def data_group(self) -> ProcessGroup | None:
        """The processes that see different batches; None if there is only this one."""
        data = self.mesh.axis(Axis.DATA)
        return data.group if data.size > 1 else None

    @meeting
    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Like `gather`, but each sample of the loader's current batch counts once; all ranks.

        [b, ...] on each process -> [samples in the global batch, ...] on all, in the order of the data. What is
        not tensors, or with `use_gather_object`, is a list of one item per sample and comes back as one list. A scalar
        comes once from each process that has samples. Raises CollectiveError for rows that are none of samples.
        """
        return gather_for_metrics(input_data, self._current_loader(), self.data_group(), use_gather_object)

    def describe(self, model: nn.Module) -> Description:
        """How a prepared model is held: its dtypes, the mesh, and what each strategy made of which part, and why.

        `print` it, or read its fields. Any rank; each describes what it holds itself.
        """
        self._part(model, "describe")
        return describe(model, self.strategies, self.precision, self.plan.sizes)

    def unwrap_model(self, model: nn.Module, *ignored: Any, **options: Any) -> nn.Module:
        """The user's own model. `prepare` works in place, so this is the model itself."""
        return model

    def init_trackers(self, project_name: str, config: Mapping[str, Any] | None = None, **options: Any) -> None:
        """Start the trackers that the config names; `config` holds the run's hyper-parameters.

        Called by all ranks or by the main process alone, which is the only one to act.
        """
        if self.is_main_process:
            for part in self.plan.trackers:
                tracker: Tracker = part.plugin(part.options, Path(self.config.project_dir))
                tracker.start(project_name, dict(config or {}))
                self.trackers[part.path.rpartition(".")[2]] = tracker

    def get_tracker(self, name: str) -> Tracker:
        """The running tracker of this name. Off the main process, one that forgets everything."""
        if self.is_main_process and name not in self.trackers:
            raise ConfigError(f"trackers: {name!r} was not started; running are: {', '.join(self.trackers) or 'none'}")
        return self.trackers.get(name) or Tracker(Tracker.Options(), Path(self.config.project_dir))

    def log(self, values: Mapping[str, Any], step: int | None = None, **options: Any) -> None:
        """Send metrics to all trackers; numbers or one-element tensors. Main process only acts."""
        if self.trackers:
            plain = {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}
            for tracker in self.trackers.values():
                tracker.log(plain, step)

    def end_training(self) -> None:
        """Finish the trackers and leave the process group; all ranks. Happens by itself when the script ends."""
        self._finish_trackers()
        try:
            self._checkpoints.finish()
        finally:
            self.wait_for_everyone()
            self.free_memory()
            if self._preemption:
                self._preemption.close()
            leave()

    def free_memory(self, *objects: Any) -> list[None]:
        """Forget everything prepared, and give back the device's unused memory; returns a None for each object."""
        for known in (self._models, self._optimizers, self._schedulers, self._loaders, self._active, self._registered):
            known.clear()
        self._boundaries.forget()
        self._checkpoints.forget()
        self._replaced.clear()
        self._verified.clear()
        for strategy in self.strategies:
            strategy.release()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        return [None] * len(objects)

    clear = free_memory

    def set_trigger(self) -> None:
        """Set a flag on this process that `check_trigger` sees on all."""
        self._trigger = True

    @meeting
    def check_trigger(self) -> bool:
        """Whether any process has set the trigger since the last check; all ranks. Resets it."""
        flag = torch.tensor(int(self._trigger), device=self.device)
        self._trigger = False
        return bool(collectives.reduce(flag, self.world.group(), "sum").item())

    def _connect(self) -> None:
        self.world.connect(self.hardware.collectives, self.config.timeout)

    def _check_world(self) -> None:
        if self.config.num_processes != self.world.size:
            raise LaunchError(
                f"num_processes: {self.config.num_processes}, but this process is one of {self.world.size}; "
                "start the script with `accel launch`, or leave num_processes out"
            )

    def _check_precision(self) -> None:
        """Refuse a dtype that the device cannot compute in; say once that it is slow where it is emulated."""
        name = self.config.mixed_precision.name
        support = self.hardware.support(getattr(torch, self.precision.dtype))
        if support is Support.NONE:
            raise ConfigError(f"mixed_precision: {name} does not run on {self.device.type}; fp32 does")
        if support is Support.EMULATED and self.is_local_main_process:
            warn(f"mixed_precision: {name} is emulated on this {self.device.type} and slower than fp32")


def _check_kind(value: Any) -> None:
    if value is not None and not isinstance(value, (nn.Module, Optimizer, DataLoader, LRScheduler)):
        raise PrepareError(
            f"prepare: expected a model (torch.nn.Module), an optimizer, a DataLoader or a learning-rate scheduler, "
            f"got {type(value).__module__}.{type(value).__qualname__}; keep it out of prepare()"
        )
