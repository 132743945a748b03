"""What the processes of a run tell the ones that they start."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from ..interfaces.launcher import Command


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a launcher asks of the agent on each machine; the config comes through the environment."""

    command: Command

    preload: bool = True
    """Import torch once, before the workers are made."""

    start: Literal["auto", "fork", "exec"] = "auto"
    """How workers are made."""

    prefix: bool = False
    """Write the rank in front of each line that a worker prints."""

    grace: float = 0.75
    """Seconds that workers have to end by themselves before they are killed."""

    timeout: float = 300
    """Seconds to wait for other machines."""

    def dump(self) -> str:
        """This job as text."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Job:
        """The job that `dump` made this text of."""
        values = json.loads(text)
        return cls(**{**values, "command": Command(**values["command"])})


def python(module: str, function: str, arguments: Sequence[str]) -> list[str]:
    """A command that calls a function of ours in a new python, with nothing of the current folder on its path."""
    code = f"import sys; sys.flags.safe_path or sys.path.pop(0); from {module} import {function}; {function}()"
    return [sys.executable, "-c", code, *arguments]
