"""`Accelerator` with the keyword arguments of Hugging Face Accelerate's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .. import accelerator as core
from .. import registry
from ..config import Config, current_config
from ..config.translation import PluginOptions, Translation, add_options, combine
from ..errors import ConfigError
from .state import Placed


class Accelerator(core.Accelerator, Placed):
    """The core's `Accelerator`, which also understands what scripts say to the one of Hugging Face Accelerate.

    Takes every setting of `Config` by name. Objects such as `DeepSpeedPlugin` stand for settings; two that
    contradict, and arguments that cannot be honoured, raise ConfigError.
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        cpu: bool = False,
        device_placement: bool = True,
        step_scheduler_with_optimizer: bool = True,
        rng_types: Sequence[str] | None = None,
        log_with: Any = None,
        project_dir: str | os.PathLike[str] | None = None,
        project_config: Translation | None = None,
        dataloader_config: Translation | None = None,
        gradient_accumulation_plugin: Translation | None = None,
        deepspeed_plugin: Translation | None = None,
        fsdp_plugin: Translation | None = None,
        kwargs_handlers: Sequence[Translation] | None = None,
        **settings: Any,
    ) -> None:
        _refuse(device_placement=device_placement, step_scheduler=step_scheduler_with_optimizer, rng_types=rng_types)
        given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
        if cpu:
            given["device"] = "cpu"
        if project_dir is not None:
            given["project_dir"] = os.fspath(project_dir)
        if log_with is not None:
            given["trackers"] = _trackers(log_with)
        objects = {
            "project_config": project_config,
            "dataloader_config": dataloader_config,
            "gradient_accumulation_plugin": gradient_accumulation_plugin,
            "deepspeed_plugin": deepspeed_plugin,
            "fsdp_plugin": fsdp_plugin,
        }
        objects.update({f"kwargs_handlers[{i}]": handler for i, handler in enumerate(kwargs_handlers or ())})
        super().__init__(translate(config or current_config(), given, objects))

    @property
    def state(self) -> Accelerator:
        """What other libraries keep apart: the place of this process. Here the accelerator knows it itself."""
        return self

    @property
    def mixed_precision(self) -> str:
        """Name of the precision; `no` for the default."""
        name = self.config.mixed_precision.name
        return "no" if name == Config().mixed_precision.name else name

    @property
    def project_dir(self) -> str:
        """Folder for what the run writes."""
        return self.config.project_dir

    def save(self, value: Any, path: str | os.PathLike[str]) -> None:
        """`torch.save`, on the main process only."""
        if self.is_main_process:
            torch.save(value, path)


def translate(config: Config, given: Mapping[str, Any], objects: Mapping[str, Translation | None]) -> Config:
    """The config with an `Accelerator`'s arguments over it: plain settings, and objects that stand for some."""
    if not isinstance(config, Config):
        raise ConfigError(f"Accelerator: expected a Config, or settings by name, got {config!r}")
    for name, value in objects.items():
        if value is not None and not isinstance(value, Translation):
            raise ConfigError(
                f"{name}: expected one of accel's own objects, got {type(value).__module__}.{type(value).__name__}"
            )
    present = [value for value in objects.values() if value is not None]
    decided = [(type(value).__name__, value.settings()) for value in present if not isinstance(value, PluginOptions)]
    config = config.replace(**combine([("Accelerator", given), *decided]))
    for value in present:
        if isinstance(value, PluginOptions):
            config = add_options(config, value.settings())
    return config


def _trackers(log_with: Any) -> list[Any]:
    """Names of trackers; `all` is every one that is installed."""
    choices = [log_with] if isinstance(log_with, str) or not isinstance(log_with, Iterable) else list(log_with)
    names = [getattr(choice, "value", choice) for choice in choices]
    if "all" in names:
        return list(registry.names("tracker"))
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ConfigError(f"log_with: expected names of trackers, got {wrong[0]!r}; register it as a tracker plugin")
    return names


def _refuse(device_placement: bool, step_scheduler: bool, rng_types: Sequence[str] | None) -> None:
    if not device_placement:
        raise ConfigError(
            "device_placement: False cannot be honoured: prepared models and batches are always moved to the device"
        )
    if not step_scheduler:
        raise ConfigError(
            "step_scheduler_with_optimizer: False cannot be honoured; keep the scheduler out of prepare()"
        )
    if rng_types is not None and [str(name) for name in rng_types] != ["generator"]:
        raise ConfigError(
            f"rng_types: {list(rng_types)!r} cannot be honoured, only ['generator']: shuffling agrees on all "
            "processes, and their other generators are their own; accel.utils.set_seed seeds them alike"
        )
