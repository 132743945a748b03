"""Where the workers of a run meet: a torch store that the agent of machine 0 holds.

The agent listens before a worker exists and hands that very socket to the store, so a port is never chosen first
and taken later: two runs cannot collide, and rank 0 holds nothing that dies with it. `TORCHELASTIC_USE_AGENT_STORE`
tells torch's `env://` that the store is there, so that rank 0 too is only a client of it.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from ..config import Config
from ..errors import ConfigError, LaunchError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

STORE_VARIABLE = "TORCHELASTIC_USE_AGENT_STORE"


class Rendezvous:
    """The meeting place of a run's workers, seen from the agent of one machine."""

    def __init__(self, config: Config) -> None:
        """Listen, on machine 0. Raises ConfigError if the address or port cannot be used."""
        self._store: TCPStore | None = None
        self._socket = _listen(config) if config.machine_rank == 0 else None
        self.port: int = self._socket.getsockname()[1] if self._socket else check_port(config)

    def serve_if_asked(self) -> None:
        """Serve if a worker is waiting for a store that does not serve yet."""
        if self._socket and select.select([self._socket], [], [], 0)[0]:
            self.serve()

    def serve(self) -> None:
        """Let the store serve, on threads of its own: not before the workers are forked. Imports torch."""
        if self._socket is None:
            return
        from torch.distributed import TCPStore  # type: ignore[attr-defined] # public, but not marked so

        host = "::1" if self._socket.family == socket.AF_INET6 else "127.0.0.1"
        address = self._socket.getsockname()[0]
        self._store = TCPStore(
            host if address in ("::", "0.0.0.0") else address,
            self.port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=self._socket.detach(),
        )
        self._socket = None

    def part(self, config: Config, timeout: float, interrupted: Callable[[], bool]) -> None:
        """Let machine 0 wait for the others, since their workers need its store until they have ended."""
        from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined] # public, but not marked so

        if self._store is None:
            with contextlib.suppress(DistError):  # machine 0 may have waited for too long and gone
                host, patience = config.main_process_ip, timedelta(seconds=timeout)
                TCPStore(host, self.port, is_master=False, timeout=patience).add("accel/parted", 1)
            return
        deadline = time.monotonic() + timeout
        while self._store.add("accel/parted", 0) < config.num_machines - 1 and time.monotonic() < deadline:
            if interrupted():
                return

    def close(self) -> None:
        """Stop listening and serving; the store's threads end with it."""
        self._store = None
        self.leave()

    def leave(self) -> None:
        """Close what a forked worker inherits of this."""
        if self._socket:
            self._socket.close()


def check_port(config: Config) -> int:
    """The port at which machines meet. Raises ConfigError if several machines were not told one."""
    if config.main_process_port is None and config.num_machines > 1:
        raise ConfigError(
            f"main_process_port: needed with num_machines {config.num_machines}; the same port on each machine, "
            "free on machine 0, such as 29500"
        )
    return config.main_process_port or 0


def free_port() -> int:
    """A port that is free at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def join(config: Config, rank: int, timeout: float) -> None:
    """Wait until the workers of all machines are here. Called by every worker of a run on several machines.

    Raises LaunchError if they do not come in time, or were started with other numbers of machines or processes.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined] # public, but not marked so

    deadline = time.monotonic() + timeout
    _knock(config, deadline, timeout)
    store = TCPStore(config.main_process_ip, check_port(config), is_master=False, timeout=timedelta(seconds=timeout))
    mine = f"{config.num_processes} processes on {config.num_machines} machines"
    theirs = store.compare_set("accel/world", "", mine).decode()
    if theirs != mine:
        raise LaunchError(f"num_machines: this machine was started for {mine}, another one for {theirs}")
    if store.add(f"accel/rank/{rank}", 1) > 1:
        raise LaunchError(f"machine_rank: more than one machine was started as {config.machine_rank}")
    while missing := [r for r in range(config.num_processes) if not store.check([f"accel/rank/{r}"])]:
        if time.monotonic() > deadline:
            local = config.num_processes // config.num_machines
            raise LaunchError(
                f"num_machines: after {timeout:g} s, of {config.num_machines} machines these have not come to "
                f"{_place(config)}: {', '.join(sorted({str(r // local) for r in missing}))}; "
                "run `accel launch --machine_rank N` on each"
            )
        time.sleep(0.1)


def _knock(config: Config, deadline: float, timeout: float) -> None:
    """Wait until machine 0 listens; torch's own client would print a page for each try."""
    while True:
        try:
            return socket.create_connection((config.main_process_ip, check_port(config)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"main_process_ip: nothing answers at {_place(config)} after {timeout:g} s "
                    f"({_reason(error)}); is `accel launch` running on machine 0?"
                ) from None
            time.sleep(0.2)


def _reason(error: OSError) -> str:
    return str(error.strerror or error).partition(" (")[0]  # python adds the address, which our messages name


def _place(config: Config) -> str:
    return f"{config.main_process_ip}:{config.main_process_port}"


def _listen(config: Config) -> socket.socket:
    """A listening socket: within this machine for a run on it alone, else on all its networks."""
    port = check_port(config)
    host = config.main_process_ip if config.num_machines == 1 else ""
    family = socket.AF_INET6 if ":" in config.main_process_ip else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=socket.SOMAXCONN)
    except OSError as error:
        setting = "main_process_port" if port else "main_process_ip"
        raise ConfigError(f"{setting}: cannot listen at {config.main_process_ip}:{port}: {_reason(error)}") from None
