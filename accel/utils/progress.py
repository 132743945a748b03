"""A progress bar that appears once, however many processes run."""

from __future__ import annotations

from typing import Any

from ..runtime.world import World


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """`tqdm.auto.tqdm` with its arguments, shown on each machine's main process only; any ranks."""
    from tqdm.auto import tqdm as bar

    if main_process_only and World.from_environment().local_rank != 0:
        kwargs["disable"] = True
    return bar(*args, **kwargs)
