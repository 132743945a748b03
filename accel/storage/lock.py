"""A folder that one process alone works on: a second run in the same place must not take it for a killed one's."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from ..errors import CheckpointError

PATIENCE = 10.0
"""Seconds to wait for a lock: the DataLoader workers of a killed run have its files open until they notice."""


def lock(folder: Path) -> int:
    """Lock a folder until `unlock` or the end of this process; returns what to unlock.

    Where the file system has no locks there is none. Raises OSError, and CheckpointError if it is locked.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            _try(handle, folder)
        if not _is_still(handle, folder):  # whoever had the lock has finished
            raise _taken(folder)
    except BaseException:
        os.close(handle)
        raise
    return handle


def unlock(handle: int) -> None:
    """Give a lock back; closing alone would not, while a forked worker has the folder open too."""
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _try(handle: int, folder: Path) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise _taken(folder) from None
        time.sleep(0.05)


def _is_still(handle: int, folder: Path) -> bool:
    return folder.exists() and os.path.samestat(os.fstat(handle), os.stat(folder))


def _taken(folder: Path) -> CheckpointError:
    return CheckpointError(f"{folder}: another run is writing this checkpoint; give each a project_dir of its own")
