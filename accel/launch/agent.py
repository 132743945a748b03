"""The process that runs the workers of one machine: warms up, makes them, waits for them.

It imports torch once and then forks the workers, which have it at no cost in time and nearly none in memory: on
two cores, four workers meet in about a quarter of the time that they take when each imports it. Forking is safe
because the agent has one thread and has not touched an accelerator; where that does not hold, workers are started
as new processes instead.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from typing import NoReturn

from ..config import Config
from ..errors import AccelError
from ..plan import Plan
from . import environment, failures, signals
from .job import Job
from .output import Prefixed
from .rendezvous import STORE_VARIABLE, Rendezvous
from .supervisor import Supervisor
from .workers import Maker, Worker


def main() -> NoReturn:
    """Be the agent: `sys.argv` holds the launcher's process id and the job."""
    launcher, job = int(sys.argv[1]), Job.load(sys.argv[2])
    signals.release(signal.SIG_DFL)
    try:
        code = run(job, Config.current(), launcher)
    except AccelError as error:
        print(f"accel: {error}", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    sys.stderr.flush()
    os._exit(code)  # nothing here is worth the time that tearing down torch takes


def run(job: Job, config: Config, launcher: int) -> int:
    """Start the workers, wait for them, tell of a failure. Returns the exit code of the run."""
    rendezvous = Rendezvous(config)
    forks = _warm_up(job, config)
    if os.getppid() != launcher:
        return 128 + signal.SIGTERM  # it ended meanwhile: nobody is left to run this for
    os.environ[STORE_VARIABLE] = "True"
    output = Prefixed() if job.prefix else None
    with signals.held():
        signals.adopt_orphans()
        supervisor = Supervisor(_make_workers(Maker(job, config, rendezvous), forks, output), launcher, job.grace)
        if output:
            output.start()
        if job.preload:
            rendezvous.serve()
        code = supervisor.wait(rendezvous.serve_if_asked)
        if code == 0 and config.num_machines > 1:
            rendezvous.part(config, job.timeout, lambda: supervisor.interrupted)
    if output:
        output.finish(job.grace)
    if supervisor.failures:
        print(failures.report(supervisor.failures, config.num_processes, supervisor.finished), end="", file=sys.stderr)
    return code


def _warm_up(job: Job, config: Config) -> bool:
    """Check the device and import what all workers need. Returns whether workers can be forked after it."""
    forks = sys.platform == "linux" if job.start == "auto" else job.start == "fork"
    if not job.preload:
        return forks
    plan = Plan.of(config)
    device = plan.find_device().plugin.type
    if device != "cpu":
        environment.drop_allocator_settings()
    if forks and plan.processes_per_machine > environment.cores():
        importlib.import_module("torch._dynamo")  # the first optimizer of each worker would
    gc.freeze()  # what is here now stays: forks need not look at it, and so share its memory
    return forks and not _initialised(device)


def _make_workers(maker: Maker, forks: bool, output: Prefixed | None) -> list[Worker]:
    workers = []
    for local_rank in range(environment.local_size(maker.config)):
        ends = output.open(environment.rank(maker.config, local_rank)) if output else (1, 2)
        workers.append(maker.fork(local_rank, ends) if forks else maker.spawn(local_rank, ends))
        if output:
            for end in ends:
                os.close(end)
    return workers


def _initialised(device: str) -> bool:
    """Whether this process has touched the accelerator, after which forks of it could not use it."""
    import torch

    return device != "cpu" and bool(torch.get_device_module(device).is_initialized())
