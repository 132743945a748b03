"""Every error that accel raises on purpose. Each message names what was wrong, what was found and what would work.

AccelError
├── ConfigError      a setting is unknown, missing, of the wrong type, or contradicts another
├── PluginError      a plugin is not installed, claimed twice, or does not fit its interface
├── PrepareError     an object given to `prepare`, or what the loop did with it, cannot be trained right
├── CollectiveError  processes brought different shapes, types or counts to one collective call
├── LaunchError      worker processes could not be started, or one of them failed
└── CheckpointError  a checkpoint is missing, or belongs to other objects
    └── DamagedError     its files are not complete, or not what was written
"""

from __future__ import annotations


class AccelError(Exception):
    """Base class: `except AccelError` catches whatever accel raises on purpose."""


class ConfigError(AccelError):
    """A setting is wrong. The message begins with the path of the setting, as in `strategies.ddp.bucket_size`."""


class PluginError(AccelError):
    """A plugin cannot be used. The message names the plugin and the package that it came from."""


class PrepareError(AccelError):
    """An object given to `Accelerator.prepare`, or a step taken with it, cannot be made right."""


class CollectiveError(AccelError):
    """The processes disagree about a collective call. The message shows what each of them brought."""


class LaunchError(AccelError):
    """The run could not be started, or a worker failed. `exit_code` is what the command should exit with."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class CheckpointError(AccelError):
    """A checkpoint cannot be written or read. The message names the folder or the key."""


class DamagedError(CheckpointError):
    """A checkpoint is not whole; an older one may be. The message names the file, and the tensor if it can be told."""
