"""Loggers that speak once, however many processes run."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

from .errors import ConfigError


class ProcessAdapter(logging.LoggerAdapter[logging.Logger]):
    """A logger whose calls take `main_process_only` (default true) and `in_order` (default false).

    logger.info("once")
    logger.info("on each process", main_process_only=False)
    logger.info("on each process, by rank", main_process_only=False, in_order=True)    # all ranks
    """

    def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        """Log on the processes asked for; `in_order` is for all ranks together, whatever their level."""
        from .runtime.world import World

        main_process_only, in_order = kwargs.pop("main_process_only", True), kwargs.pop("in_order", False)
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1  # this method is not where the message comes from
        world = World.from_environment()
        if main_process_only:
            if world.rank == 0:
                super().log(level, msg, *args, **kwargs)
        elif in_order:
            from .utils.operations import wait_for_everyone

            for rank in range(world.size):
                if rank == world.rank:
                    super().log(level, msg, *args, **kwargs)
                wait_for_everyone()
        else:
            super().log(level, msg, *args, **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Leave the caller's `extra` alone."""
        return msg, kwargs


def get_logger(name: str, log_level: str | int | None = None) -> ProcessAdapter:
    """A logger of this name that speaks on the main process only, unless a call says otherwise.

    `log_level` is a name or number as in Python's logging; by default the level that is set there.
    """
    logger = logging.getLogger(name)
    if log_level is not None:
        try:
            logger.setLevel(log_level.upper() if isinstance(log_level, str) else log_level)
        except (ValueError, TypeError):
            known = ", ".join(logging.getLevelNamesMapping())
            raise ConfigError(f"log_level: {log_level!r} is no level; there are: {known}") from None
    return ProcessAdapter(logger, {})
