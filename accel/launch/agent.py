"""The process that runs the workers of one machine: warms up, makes them, waits for them.

It imports torch once and then forks the workers, which have it at no cost in time and nearly none in memory: on
two cores, four workers meet in about a quarter of the time that they take when each imports it. Forking is safe
because the agent has one thread and has not touched an accelerator; where that does not hold, workers are started
as new processes instead. Waiting is one loop (`Supervisor`), in which signals, failures and the end of the launcher
are all just reasons to send the workers a signal now and another one later.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from signal import Signals
from typing import Literal, NoReturn

from ..config import Config
from ..errors import AccelError
from ..interfaces.launcher import Command
from ..plan import Plan
from . import environment, failures, signals
from .failures import Failure
from .rendezvous import STORE_VARIABLE, Rendezvous

TICK = 0.1
"""Seconds between two looks at what does not announce itself by a signal."""

SETTLE = 0.2
"""Seconds after the first failure in which a peer's may come to light that was its cause."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a launcher asks of the agent on each machine; the config comes through the environment."""

    command: Command

    preload: bool = True
    """Import torch once, before the workers are made."""

    start: Literal["auto", "fork", "exec"] = "auto"
    """How workers are made."""

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


@dataclass
class Worker:
    """A worker process, seen from the agent."""

    rank: int
    pid: int
    report: int
    status: int | None = None
    ended: float = 0.0

    @property
    def failure(self) -> Failure | None:
        """How it failed, if it did: by its own account, else by how it ended."""
        if told := Failure.read(self.report):
            return told
        return Failure(self.rank, self.status, self.ended) if self.status else None

    def send(self, number: Signals) -> None:
        """Send it a signal, if it is still running; one that has failed is already on its way to the end."""
        if self.status is None and not (number == Signals.SIGTERM and Failure.read(self.report)):
            os.kill(self.pid, number)


def main() -> NoReturn:
    """Be the agent: `sys.argv` holds the launcher's process id and the job."""
    launcher, job = int(sys.argv[1]), Job.load(sys.argv[2])
    signals.release(signal.SIG_DFL)
    try:
        code = Agent(job, Config.current(), launcher).run()
    except AccelError as error:
        print(f"accel: {error}", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    sys.stderr.flush()
    os._exit(code)  # nothing here is worth the time that tearing down torch takes


class Agent:
    """Runs a job's workers on this machine."""

    def __init__(self, job: Job, config: Config, launcher: int) -> None:
        self.job, self.config, self.launcher = job, config, launcher
        self.processes = config.num_processes // config.num_machines

    def run(self) -> int:
        """Start the workers, wait for them, report a failure. Returns the exit code of the run."""
        rendezvous = Rendezvous(self.config)
        forks = self._warm_up()
        os.environ[STORE_VARIABLE] = "True"
        with signals.held():
            signals.adopt_orphans()
            make = self._fork if forks else self._exec
            workers = [make(local_rank, rendezvous) for local_rank in range(self.processes)]
            if self.job.preload:
                rendezvous.serve()
            supervisor = Supervisor(workers, self.launcher, self.job.grace)
            code = supervisor.wait(lambda: rendezvous.serve() if rendezvous.asked else None)
            if supervisor.failures and (text := failures.report(supervisor.failures, self.config.num_processes)):
                print(text, file=sys.stderr)
        return code

    def _warm_up(self) -> bool:
        """Check the device and import what all workers need. Returns whether workers can be forked after it."""
        forks = sys.platform == "linux" if self.job.start == "auto" else self.job.start == "fork"
        if not self.job.preload:
            return forks
        device = Plan.of(self.config).find_device().plugin.type
        if device != "cpu":
            environment.drop_allocator_settings()
        if forks and self.processes > environment.cores():
            importlib.import_module("torch._dynamo")  # the first optimizer of each worker would
        gc.freeze()  # what is here now stays: forks need not look at it, and so share its memory
        return forks and not _initialised(device)

    def _fork(self, local_rank: int, rendezvous: Rendezvous) -> Worker:
        report, agent = _anonymous_file(), os.getpid()
        rank = self.config.machine_rank * self.processes + local_rank
        pid = os.fork()
        if pid:
            return Worker(rank, pid, report)
        try:
            os.environ.update(environment.for_worker(self.config, local_rank, rendezvous.port))
            rendezvous.leave()
            if local_rank:
                _give_up_input()
            signals.release()
            from . import worker

            worker.run(self.job.command, self.config, rank, report, agent, self.job.timeout)
        except BaseException:  # noqa: BLE001 - a fork must not run on into the agent's own code
            traceback.print_exc()
        finally:
            os._exit(1)

    def _exec(self, local_rank: int, rendezvous: Rendezvous) -> Worker:
        report = _anonymous_file()
        rank = self.config.machine_rank * self.processes + local_rank
        os.set_inheritable(report, True)
        arguments = [str(os.getpid()), str(rank), str(local_rank), str(report), self.job.dump()]
        pid = os.posix_spawn(
            sys.executable,
            python("accel.launch.agent", "be_worker", arguments),
            {**os.environ, **environment.for_worker(self.config, local_rank, rendezvous.port)},
        )
        os.set_inheritable(report, False)
        return Worker(rank, pid, report)


def be_worker() -> NoReturn:
    """Be a worker that was not forked but started as a new process."""
    from . import worker

    agent, rank, local_rank, report = map(int, sys.argv[1:5])
    job = Job.load(sys.argv[5])
    if local_rank:
        _give_up_input()
    os.set_inheritable(report, False)
    signals.release()
    worker.run(job.command, Config.current(), rank, report, agent, job.timeout)


class Supervisor:
    """Waits for workers, and ends those that are left at the first failure, at a signal, or without its launcher."""

    def __init__(self, workers: Sequence[Worker], launcher: int, grace: float) -> None:
        self.workers, self.launcher, self.grace = {w.pid: w for w in workers}, launcher, grace
        self.failures: list[Failure] = []
        self._asked: Signals | None = None
        self._orphaned = False
        self._settled = math.inf
        """When the rest is ended because of a failure: what fails later fails because of that."""
        self._due: list[tuple[float, Signals]] = []
        """When to send which signal to the workers that are left."""

    def wait(self, each_tick: Callable[[], object]) -> int:
        """Wait until no worker is left. Returns the exit code of the run."""
        while any(worker.status is None for worker in self.workers.values()):
            self._take(signals.next_event(TICK))
            self._reap()
            self._look()
            self._send_due()
            each_tick()
        if self._asked or self._orphaned or self.failures:
            signals.end_orphans(self.grace)
        if self._asked:
            return 128 + self._asked
        return failures.culprit(self.failures).exit_code if self.failures else 0

    def _take(self, event: signals.Event | None) -> None:
        """Pass a request to end on to the workers. Only Ctrl-C has a deadline: who sends SIGTERM follows it up."""
        if event is None or event.signal not in signals.ENDING:
            return
        self._asked, now = event.signal, time.monotonic()
        self._due = [] if event.from_terminal else [(now, event.signal)]
        if event.signal == Signals.SIGINT:
            self._due.append((now + self.grace, Signals.SIGKILL))

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if worker := self.workers.get(ended[0]):
                    worker.status, worker.ended = os.waitstatus_to_exitcode(ended[1]), time.monotonic()

    def _look(self) -> None:
        """Notice the end of the launcher, the first failure, and those that follow before the rest is ended."""
        now = time.monotonic()
        if not self._orphaned and os.getppid() != self.launcher:
            self._orphaned = True
            self._end(now)
        if self._asked or self._orphaned or now > self._settled:
            return
        self.failures = [f for w in self.workers.values() if (f := w.failure)]
        if self.failures and self._settled == math.inf:
            self._settled = now + SETTLE
            self._end(self._settled)

    def _end(self, at: float) -> None:
        self._due = [(at, Signals.SIGTERM), (at + self.grace, Signals.SIGKILL)]

    def _send_due(self) -> None:
        while self._due and time.monotonic() >= self._due[0][0]:
            _, number = self._due.pop(0)
            for worker in self.workers.values():
                worker.send(number)


def _anonymous_file() -> int:
    """A file without a name: it is gone with the last process that has it open."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _give_up_input() -> None:
    """Leave the terminal's input to the first worker: they cannot share it."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _initialised(device: str) -> bool:
    """Whether this process has touched the accelerator, after which forks of it could not use it."""
    import torch

    return device != "cpu" and bool(torch.get_device_module(device).is_initialized())


def python(module: str, function: str, arguments: Sequence[str]) -> list[str]:
    """A command that calls a function of ours in a new python, with nothing of the current folder on its path."""
    code = f"import sys; sys.flags.safe_path or sys.path.pop(0); from {module} import {function}; {function}()"
    return [sys.executable, "-c", code, *arguments]
