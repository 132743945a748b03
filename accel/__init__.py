"""Run one unchanged PyTorch training loop on any hardware, at any scale.

The public names are resolved when they are first used, so that `import accel` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compat.accelerator import Accelerator as Accelerator
    from .compat.plugins import AutocastKwargs as AutocastKwargs
    from .compat.plugins import DataLoaderConfiguration as DataLoaderConfiguration
    from .compat.plugins import DeepSpeedPlugin as DeepSpeedPlugin
    from .compat.plugins import DistributedDataParallelKwargs as DistributedDataParallelKwargs
    from .compat.plugins import FullyShardedDataParallelPlugin as FullyShardedDataParallelPlugin
    from .compat.plugins import GradientAccumulationPlugin as GradientAccumulationPlugin
    from .compat.plugins import GradScalerKwargs as GradScalerKwargs
    from .compat.plugins import InitProcessGroupKwargs as InitProcessGroupKwargs
    from .compat.plugins import ProjectConfiguration as ProjectConfiguration
    from .compat.state import DistributedType as DistributedType
    from .compat.state import PartialState as PartialState
    from .config import Config as Config
    from .errors import AccelError as AccelError
    from .errors import CheckpointError as CheckpointError
    from .errors import CollectiveError as CollectiveError
    from .errors import ConfigError as ConfigError
    from .errors import LaunchError as LaunchError
    from .errors import PluginError as PluginError
    from .errors import PrepareError as PrepareError
    from .runtime.loader import skip_first_batches as skip_first_batches
    from .utils.memory import find_executable_batch_size as find_executable_batch_size

_HOMES = {
    "Accelerator": ".compat.accelerator",
    "AutocastKwargs": ".compat.plugins",
    "DataLoaderConfiguration": ".compat.plugins",
    "DeepSpeedPlugin": ".compat.plugins",
    "DistributedDataParallelKwargs": ".compat.plugins",
    "DistributedType": ".compat.state",
    "FullyShardedDataParallelPlugin": ".compat.plugins",
    "GradScalerKwargs": ".compat.plugins",
    "GradientAccumulationPlugin": ".compat.plugins",
    "InitProcessGroupKwargs": ".compat.plugins",
    "PartialState": ".compat.state",
    "ProjectConfiguration": ".compat.plugins",
    "Config": ".config",
    "AccelError": ".errors",
    "CheckpointError": ".errors",
    "CollectiveError": ".errors",
    "ConfigError": ".errors",
    "LaunchError": ".errors",
    "PluginError": ".errors",
    "PrepareError": ".errors",
    "find_executable_batch_size": ".utils.memory",
    "skip_first_batches": ".runtime.loader",
}
"""Where each public name lives."""

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("accel-torch")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
