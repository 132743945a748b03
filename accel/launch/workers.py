"""Making a worker process: forked from the agent, or started anew where that is not safe.

Both ways lead to `worker.run`. Either way the worker inherits one file, in which it tells of its failure.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from dataclasses import dataclass
from signal import Signals
from typing import NoReturn

from ..config import Config, current_config
from . import environment, signals, worker
from .failures import Failure
from .job import Job, python
from .rendezvous import Rendezvous


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
        """How it failed, if it did; it may still be running then."""
        if self.status is None:
            return Failure.read(self.report)
        return Failure.of_ended(self.rank, self.status, self.ended, self.report)

    def send(self, number: Signals) -> None:
        """Send it a signal, if it is still running; one that has failed is already on its way to the end."""
        if self.status is None and not (number == Signals.SIGTERM and Failure.read(self.report)):
            os.kill(self.pid, number)


@dataclass(frozen=True)
class Maker:
    """Makes the workers of a run on this machine."""

    job: Job
    config: Config
    rendezvous: Rendezvous

    def fork(self, local_rank: int, output: tuple[int, int]) -> Worker:
        """A worker that has all that the agent has imported. `output` becomes its standard output and error."""
        report, agent = _anonymous_file(), os.getpid()
        if pid := os.fork():
            return Worker(environment.rank(self.config, local_rank), pid, report)
        try:
            os.environ.update(environment.for_worker(self.config, local_rank, self.rendezvous.port))
            self.rendezvous.leave()
            for inherited, standard in zip(output, (1, 2), strict=True):
                os.dup2(inherited, standard)
            _be_worker(self.job, self.config, local_rank, report, agent)
        except BaseException:  # noqa: BLE001 - a fork must not run on into the agent's own code
            traceback.print_exc()
        finally:
            os._exit(1)

    def spawn(self, local_rank: int, output: tuple[int, int]) -> Worker:
        """A worker in a new python."""
        report = _anonymous_file()
        os.set_inheritable(report, True)
        pid = os.posix_spawn(
            sys.executable,
            python("accel.launch.workers", "main", [str(os.getpid()), str(local_rank), str(report), self.job.dump()]),
            {**os.environ, **environment.for_worker(self.config, local_rank, self.rendezvous.port)},
            file_actions=[(os.POSIX_SPAWN_DUP2, output[0], 1), (os.POSIX_SPAWN_DUP2, output[1], 2)],
        )
        os.set_inheritable(report, False)
        return Worker(environment.rank(self.config, local_rank), pid, report)


def main() -> NoReturn:
    """Be a worker in a new python; `sys.argv` says which."""
    agent, local_rank, report = map(int, sys.argv[1:4])
    os.set_inheritable(report, False)
    _be_worker(Job.load(sys.argv[4]), current_config(), local_rank, report, agent)


def _be_worker(job: Job, config: Config, local_rank: int, report: int, agent: int) -> NoReturn:
    if local_rank:
        _give_up_input()
    signals.release()
    worker.run(job.command, config, environment.rank(config, local_rank), report, agent, job.timeout)


def _anonymous_file() -> int:
    """A file without a name: it is gone with the last process that has it open."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _give_up_input() -> None:
    """Leave the terminal's input to the first worker: they cannot share it."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
