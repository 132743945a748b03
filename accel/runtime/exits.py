"""Failures that show only when the script is over."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from ..errors import AccelError


def script_failed() -> bool:
    """Whether an exception has ended the script; asked at exit."""
    return hasattr(sys, "last_type")


def fail_at_exit(error: AccelError, told: bool = False) -> NoReturn:
    """End the process with exit code 1, which an exception at this late hour would not; say why unless that is told."""
    if not told:
        print(f"accel: {error}", file=sys.stderr)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(1)
