"""The `accel` command. Imports no torch, and of its commands only the one that is run.

Each command is a module with `HELP`, `add_arguments(parser)` and `run(options) -> exit code`.
"""

from .main import main

__all__ = ["main"]
