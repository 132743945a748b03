"""Every setting of a run: its name, type, default and meaning, and the ways in which it is given.

`settings` declares them, `parse` checks plain values against a declaration, `text` reads and writes them as YAML,
`sources` layers defaults, file, environment, flags and arguments. `foreign` reads files in another library's words;
`translation`, `deepspeed` and `fsdp` are what those have in common with the objects of scripts. Nothing else in accel
has defaults, and nothing else reads `ACCEL_*` variables.
"""

from .parse import Choice, Setting, describe, parse_dataclass, parse_setting, setting, type_name
from .settings import Config
from .sources import (
    CONFIG_VARIABLE,
    FILE_VARIABLE,
    Resolved,
    current_config,
    default_path,
    read_file,
    relevant_variables,
    resolve,
    variable,
)
from .text import load_value, one_line, render

__all__ = [
    "current_config",
    "CONFIG_VARIABLE",
    "FILE_VARIABLE",
    "Choice",
    "Config",
    "Resolved",
    "Setting",
    "default_path",
    "describe",
    "load_value",
    "one_line",
    "parse_dataclass",
    "parse_setting",
    "read_file",
    "relevant_variables",
    "render",
    "resolve",
    "setting",
    "type_name",
    "variable",
]
