"""Every setting of a run: its name, type, default and meaning, and the ways in which it is given.

`settings` declares them, `parse` checks plain values against a declaration, `sources` layers defaults, file,
environment, flags and arguments. Nothing else in accel has defaults, and nothing else reads `ACCEL_*` variables.
"""

from .parse import Choice, Setting, describe, parse_dataclass, setting
from .settings import Config
from .sources import CONFIG_VARIABLE, Resolved, default_path, read_file, resolve

__all__ = [
    "CONFIG_VARIABLE",
    "Choice",
    "Config",
    "Resolved",
    "Setting",
    "default_path",
    "describe",
    "parse_dataclass",
    "read_file",
    "resolve",
    "setting",
]
