"""Run one unchanged PyTorch training loop on any hardware, at any scale.

The public names are resolved when they are first used, so that `import accel` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .accelerator import Accelerator as Accelerator
    from .config import Config as Config
    from .errors import AccelError as AccelError

_HOMES = {
    "Accelerator": ".accelerator",
    "Config": ".config",
    "AccelError": ".errors",
    "CheckpointError": ".errors",
    "CollectiveError": ".errors",
    "ConfigError": ".errors",
    "LaunchError": ".errors",
    "PluginError": ".errors",
    "PrepareError": ".errors",
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
