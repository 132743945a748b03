"""Run a function on n gloo processes, in a tenth of a second each time.

The processes are forked from one warm process that has imported torch once (`warm`). The alternative, n fresh
interpreters, costs more than a second of imports per process and call.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import os
import pickle
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Any, TypeVar

from .warm import STACKS_WAIT, Died, Hung, Outcome, Raised, Request, Returned, main

T = TypeVar("T")

PRELOADED = (
    "torch",
    "torch._dynamo",  # the first optimizer of a process imports it
    "torch.nn.parallel.distributed",
    "torch.distributed.device_mesh",
    "torch.utils.data",
    "accel.compat.accelerator",
    "accel.testing.training",
)
"""What the warm process has imported before it forks."""


class WorkerError(RuntimeError):
    """A worker ended without a result, or with an exception that cannot be handed over as itself."""


class Processes:
    """A warm process and the workers forked from it. Close it, or use it as a context manager.

    `modules` are those that every worker finds imported; none of them may start a thread.
    """

    def __init__(self, modules: Sequence[str] = PRELOADED) -> None:
        self.modules = list(modules)
        self._process: subprocess.Popen[bytes] | None = None
        self._control: Connection | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        self.close()

    def run(
        self,
        n: int,
        function: Callable[..., T],
        *arguments: Any,
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> list[T]:
        """Call `function(*arguments)` on n processes at once and return each rank's result.

        The function, its arguments and its results are pickled, so it is one that a module defines. Each
        process gets torch's variables (RANK, WORLD_SIZE, MASTER_PORT, ...), the caller's environment changed
        by `env`, its folder, import path, output and warning filters. It joins no process group by itself.

        The first exception of a worker is raised here as itself, its rank and traceback in its notes, and ends
        the other workers. Raises WorkerError if a worker dies, TimeoutError with the stacks of the ranks that
        still run after `timeout` seconds. No worker outlives the call.
        """
        call = _pickle(function, arguments)
        request = Request(
            processes=n,
            call=call,
            files=_files(function),
            path=[os.path.abspath(folder) for folder in sys.path],
            environment={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            folder=os.getcwd(),
            timeout=timeout,
        )
        outcomes = self._ask(request)
        for rank, outcome in outcomes.items():
            _raise(rank, outcome, outcomes)
        return [pickle.loads(outcomes[rank].result) for rank in range(n)]  # type: ignore[union-attr]

    def start(self) -> None:
        """Start the warm process, if it is not there yet; `run` does so too. Takes a second or two."""
        if self._process is not None:
            return
        ours, theirs = Pipe()
        self._control = ours
        code = f"from {main.__module__} import main; main({theirs.fileno()}, {self.modules})"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
            start_new_session=True,  # Ctrl-C reaches the caller alone, which then closes the connection
        )
        theirs.close()
        try:
            ours.recv()
        except EOFError:
            self.close()
            raise WorkerError("the warm process could not start; its own message is above") from None

    def close(self) -> None:
        """End the warm process, and with it every worker. Harmless when there is none."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.wait()
        self._control = self._process = None

    @property
    def pid(self) -> int | None:
        """The process id of the warm process while there is one."""
        return self._process.pid if self._process else None

    def _ask(self, request: Request) -> dict[int, Outcome]:
        """Send a request and wait for its outcomes. A call that is broken off takes the warm process with it."""
        self.start()
        control = self._control
        assert control is not None
        try:
            control.send(request)
            with socket.socket(fileno=os.dup(control.fileno())) as channel:
                socket.send_fds(channel, [b"."], [1, 2])
            if not control.poll(request.timeout + STACKS_WAIT + 30):
                raise WorkerError("the warm process does not answer")
            outcomes: dict[int, Outcome] = control.recv()
        except EOFError:
            self.close()
            raise WorkerError("the warm process died during the call") from None
        except BaseException:
            self.close()
            raise
        return outcomes


@functools.cache
def shared_processes() -> Processes:
    """The processes that `run` uses; closed when this interpreter ends."""
    processes = Processes()
    atexit.register(processes.close)
    return processes


def run(
    n: int, function: Callable[..., T], *arguments: Any, env: Mapping[str, str] | None = None, timeout: float = 60.0
) -> list[T]:
    """Call `function(*arguments)` on n processes at once and return each rank's result; see `Processes.run`."""
    return shared_processes().run(n, function, *arguments, env=env, timeout=timeout)


def _pickle(function: Callable[..., Any], arguments: Sequence[Any]) -> bytes:
    try:
        return pickle.dumps((function, arguments, list(warnings.filters)))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"run: {function!r} and its arguments must be picklable, as a function that a module defines is: {error}"
        ) from error


def _files(function: Callable[..., Any]) -> dict[str, str]:
    """The files of the modules that a worker may be unable to import by name."""
    while isinstance(function, functools.partial):
        function = function.func
    names = {"__main__", getattr(inspect.unwrap(function), "__module__", "__main__")}
    found = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    return {name: os.path.abspath(file) for name, file in found.items() if file}


def _raise(rank: int, outcome: Outcome, outcomes: Mapping[int, Outcome]) -> None:
    if isinstance(outcome, Returned):
        return
    if isinstance(outcome, Hung):
        stacks = "\n".join(f"[rank {r}]\n{o.stacks}" for r, o in sorted(outcomes.items()) if isinstance(o, Hung))
        ranks = ", ".join(str(r) for r in sorted(outcomes))
        raise TimeoutError(f"still running at the timeout: rank {ranks}\n{stacks}")
    if isinstance(outcome, Died):
        how = f"was ended by signal {-outcome.code}" if outcome.code < 0 else f"exited with code {outcome.code}"
        raise WorkerError(f"rank {rank} {how} before it returned")
    raise _exception(rank, outcome)


def _exception(rank: int, raised: Raised) -> BaseException:
    """A worker's exception, with its rank and traceback in the notes."""
    error: BaseException = WorkerError(raised.summary)
    if raised.error is not None:
        error = pickle.loads(raised.error)
    error.add_note(f"raised on rank {rank}:\n{raised.traceback.rstrip()}")
    return error
