"""The warm process behind `run`: imports torch once, then forks the workers of each call.

It is one thread, so that forking is safe, and imports no user code, so that every worker starts from the same
clean state. It serves one request at a time and ends, workers and all, when the process that started it does.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import IO

from .callers import Unpickler

STACKS_SIGNAL = signal.SIGUSR1
STACKS_WAIT = 1.0
"""Seconds in which a hung worker has to write its stacks."""


@dataclass(frozen=True)
class Request:
    """One call of `run`: what its workers execute, and the state of the caller that they take over."""

    processes: int
    call: bytes
    """Pickled (function, arguments, warning filters); only the workers open it."""
    files: Mapping[str, str]
    """Where to find modules that the call needs and that may not be on the path, `__main__` for one."""
    path: Sequence[str]
    environment: Mapping[str, str]
    folder: str
    timeout: float


@dataclass(frozen=True)
class Returned:
    """A worker's function returned this pickled result."""

    result: bytes


@dataclass(frozen=True)
class Raised:
    """A worker's function raised; `error` is the pickled exception, if it can be pickled."""

    error: bytes | None
    summary: str
    traceback: str


@dataclass(frozen=True)
class Died:
    """A worker ended without a result: its exit code, negative for a signal."""

    code: int


@dataclass(frozen=True)
class Hung:
    """A worker was still running at the timeout, at these stacks."""

    stacks: str


Outcome = Returned | Raised | Died | Hung


@dataclass
class _Worker:
    rank: int
    pid: int
    connection: Connection
    stacks: IO[bytes]


def main(descriptor: int, modules: Sequence[str]) -> None:
    """Import the modules, then answer requests until the other end of the connection closes."""
    control = Connection(descriptor)
    gc.disable()  # what is imported is no garbage
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # what is here now stays: no worker looks for garbage in it
    gc.enable()
    control.send(None)
    while True:
        try:
            request: Request = control.recv()
            with socket.socket(fileno=os.dup(control.fileno())) as channel:
                _, output, _, _ = socket.recv_fds(channel, 1, 2)
        except EOFError:
            os._exit(0)  # nothing here is worth the half second in which torch is taken apart
        try:
            outcomes = _serve(request, control, output)
        finally:
            for stream in output:
                os.close(stream)
        control.send(outcomes)


def _serve(request: Request, control: Connection, output: Sequence[int]) -> dict[int, Outcome]:
    """Run one request's workers to their end: all results, or the outcomes of those at fault."""
    with _free_port() as port:
        workers: list[_Worker] = []
        try:
            for rank in range(request.processes):
                workers.append(_fork(request, rank, port.getsockname()[1], control, output))
            return _watch(workers, control, request.timeout)
        finally:
            _reap(workers)


def _free_port() -> socket.socket:
    """A bound socket that never listens: the kernel gives its port to nobody else, yet rank 0 may listen there."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", 0))
    return holder


def _watch(workers: Sequence[_Worker], control: Connection, timeout: float) -> dict[int, Outcome]:
    """Collect results until all are there, one worker fails, or time is up."""
    deadline = time.monotonic() + timeout
    results: dict[int, Outcome] = {}
    running = {worker.connection: worker for worker in workers}
    while running:
        ready = wait([control, *running], max(deadline - time.monotonic(), 0))
        if control in ready:  # nothing is sent during a call: the caller is gone
            _reap(workers)
            os._exit(0)
        if not ready:
            return _hung([*running.values()])
        for connection in ready:
            worker = running.pop(connection)  # type: ignore[call-overload]
            outcome = _outcome(worker)
            if not isinstance(outcome, Returned):
                return {worker.rank: outcome}
            results[worker.rank] = outcome
    return results


def _outcome(worker: _Worker) -> Outcome:
    try:
        outcome: Outcome = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        _, status = os.waitpid(worker.pid, 0)
        worker.pid = 0
        return Died(os.waitstatus_to_exitcode(status))
    return outcome


def _hung(workers: Sequence[_Worker]) -> dict[int, Outcome]:
    """Ask every worker for its stacks at once, and wait until none writes any more."""
    for worker in workers:
        os.kill(worker.pid, STACKS_SIGNAL)
    deadline = time.monotonic() + STACKS_WAIT
    sizes, before = [0], [-1]
    while time.monotonic() < deadline and (sizes != before or not all(sizes)):
        time.sleep(0.02)
        before, sizes = sizes, [os.fstat(worker.stacks.fileno()).st_size for worker in workers]
    return {worker.rank: Hung(_read(worker.stacks)) for worker in workers}


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _reap(workers: Sequence[_Worker]) -> None:
    """Kill what is left of every worker, its own children included, and wait for it."""
    for worker in workers:
        if worker.pid:
            os.killpg(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)
            worker.pid = 0
        worker.connection.close()
        worker.stacks.close()


def _fork(request: Request, rank: int, port: int, control: Connection, output: Sequence[int]) -> _Worker:
    ours, theirs = Pipe()
    stacks = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the worker
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)  # in both processes: whichever comes first
        theirs.close()
        return _Worker(rank, pid, ours, stacks)
    code = 1
    try:
        os.setpgid(0, 0)
        _end_with_parent()
        ours.close()
        control.close()
        faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
        _take_over(request, rank, port, output)
        theirs.send(_call(request))
        code = 0
        with contextlib.suppress(EOFError):
            theirs.recv_bytes()  # rank 0 serves the others' store: it stays until all are done
    except BaseException:  # noqa: BLE001 - it goes no further than this process, whose exit code tells of it
        traceback.print_exc()
    finally:
        os._exit(code)


def _end_with_parent() -> None:
    """On Linux the kernel kills this process when the warm process dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() == 1:
            os._exit(1)


def _take_over(request: Request, rank: int, port: int, output: Sequence[int]) -> None:
    """Become rank `rank` of the request: the caller's output, folder, path and environment, and torch's variables."""
    for stream, target in zip(output, (1, 2), strict=True):
        os.dup2(stream, target)
    os.chdir(request.folder)
    sys.path[:] = request.path
    os.environ.clear()
    os.environ.update(request.environment)
    size = str(request.processes)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _call(request: Request) -> Outcome:
    """Call the request's function; whatever it raises becomes an outcome."""
    try:
        function, arguments, filters = Unpickler(request.call, request.files).load()
        warnings.resetwarnings()
        warnings.filters[:] = filters  # type: ignore[index]
        return Returned(pickle.dumps(function(*arguments)))
    except BaseException as error:  # noqa: BLE001 - all of it is the caller's to see
        return _raised(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _raised(error: BaseException) -> Raised:
    frames = error.__traceback__.tb_next if error.__traceback__ else None  # without our own call
    text = "".join(traceback.format_exception(type(error), error, frames))
    summary = "".join(traceback.format_exception_only(error)).strip()
    if isinstance(error, (SystemExit, KeyboardInterrupt)):  # raised in the caller, these would end it
        return Raised(None, summary, text)
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:  # noqa: BLE001 - an exception may fail to pickle in any way; its text is sent instead
        return Raised(None, summary, text)
    return Raised(pickled, summary, text)
