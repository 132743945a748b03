"""One process on its own."""

from __future__ import annotations

from typing import Any

from accel.errors import ConfigError
from accel.interfaces import Strategy


class Single(Strategy):
    """One process holds and computes everything; refuses to run as part of several."""

    @classmethod
    def check(cls, options: Any, size: int) -> None:
        if size > 1:
            raise ConfigError(f"size: trains on one process, got {size}; `strategies: ddp` trains on several")
