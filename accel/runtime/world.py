"""Which process am I, and how do I reach the others? The one reader of torch's rank variables."""

from __future__ import annotations

import atexit
import functools
import gc
import itertools
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, ProcessGroup, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.rendezvous import rendezvous

from ..errors import LaunchError

_stores = itertools.count()
"""Numbers the stores that were asked for, alike on all ranks."""


@dataclass(frozen=True)
class World:
    """The place of this process among all: the contract between torch and every launcher."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> World:
        """Read the variables that launchers set; without them, a world of one.

        Raises LaunchError if they are set in part, or contradict each other: two processes that both believe
        they are rank 0 would train apart and overwrite each other's results.
        """
        given = {
            name: environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name in environ
        }
        if "RANK" not in given and "WORLD_SIZE" not in given:
            return cls(0, 1, 0, 1)
        rank, size = (_integer(environ, name) for name in ("RANK", "WORLD_SIZE"))
        if not 0 <= rank < size:
            raise LaunchError(f"RANK={rank} is not one of WORLD_SIZE={size} processes; ranks start at 0")
        if size > 1 and len(given) < 4:
            missing = {"MASTER_ADDR", "MASTER_PORT"} - set(given)
            raise LaunchError(
                f"WORLD_SIZE={size}, but {', '.join(sorted(missing))} is not set; start with `accel launch`"
            )
        local_rank = int(environ.get("LOCAL_RANK", rank))
        return cls(rank, size, local_rank, int(environ.get("LOCAL_WORLD_SIZE", size)))

    def connect(self, backend: str, timeout: float) -> None:
        """Join the process group, once; all ranks. A world of one makes a group of itself.

        `timeout` is in seconds: how long a collective call waits for the other processes before it fails.
        """
        if dist.is_initialized():
            return
        if self.size == 1:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        else:
            patience = timedelta(seconds=timeout)
            store, rank, size = next(rendezvous("env://", self.rank, self.size, timeout=patience))
            store.set_timeout(patience)
            # Of its own for each attempt: torchrun's store keeps the addresses of the processes before a restart.
            store = PrefixStore(f"accel/attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        atexit.register(leave)

    def store(self, purpose: str) -> Store:
        """A connection of its own to the store where the processes met, with keys of its own; after `connect`."""
        return PrefixStore(f"accel/{purpose}/{next(_stores)}", _get_default_store().clone())  # type: ignore[attr-defined]

    def group(self) -> ProcessGroup | None:
        """All processes; None if there is only this one."""
        return dist.group.WORLD if self.size > 1 else None


@functools.cache
def machine_store() -> Store | None:
    """A store that only the processes of this machine ask, for what all of them ask often; None if there are no others.

    All ranks call this. Every process offers one, and the first offer is taken. The store ends with its process: where
    that may be before others have asked, they mind DistNetworkError.
    """
    if World.from_environment().local_size == dist.get_world_size():
        return None
    offers = PrefixStore(f"accel/machine/{_machine()}", _get_default_store())
    own = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    port = int(offers.compare_set("port", "", str(own.port)))
    return own if port == own.port else TCPStore("localhost", port, is_master=False)


def _machine() -> str:
    """Names what processes share that reach each other under `localhost`."""
    boot, network = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    if not (boot.exists() and network.exists()):
        return socket.gethostname()
    return f"{boot.read_text().strip()}/{network.stat().st_ino}"


def leave() -> None:
    """Leave the process group, if there is one; safe to call twice.

    What still refers to the group is collected first: torch aborts if a reducer outlives its group.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def _integer(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name)
    if text is None or not text.isdecimal():
        raise LaunchError(f"{name}={text} is not a number; RANK and WORLD_SIZE are set together, by a launcher")
    return int(text)
