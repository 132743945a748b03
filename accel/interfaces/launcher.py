"""The interface of a launcher: what turns a config into running worker processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config import Config


PREEMPTED = 75
"""Exit code of a worker that has saved and stopped, on a signal or at the time limit: EX_TEMPFAIL of sysexits.h."""


@dataclass(frozen=True)
class Command:
    """What each worker runs: `python target arguments`, or `python -m target arguments`."""

    target: str
    arguments: Sequence[str] = ()
    module: bool = False

    def argv(self, python: str) -> list[str]:
        """The command line that runs it with the interpreter `python`."""
        return [python, *(["-m"] if self.module else []), self.target, *self.arguments]


class Launcher:
    """Runs the command in this very process's place, as a world of one; a plugin starts workers.

    A launcher imports torch only where workers need it. Each worker gets torch's own variables (RANK,
    LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and `accel.config.CONFIG_VARIABLE`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """The settings of this launcher, under its name in the config."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def describe(self, command: Command, config: Config) -> str:
        """What `launch` would run, for `accel launch --dry_run`: one line per worker, runnable by hand."""
        raise NotImplementedError(f"{type(self).__name__}.describe")

    def launch(self, command: Command, config: Config) -> int:
        """Run the command on every process and return the exit code: 0, or the first failure's.

        The first failure ends the other workers. Raises LaunchError if workers cannot be started.
        """
        raise NotImplementedError(f"{type(self).__name__}.launch")
