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
import time
from pathlib import Path
from typing import NoReturn

from ..config import CONFIG_VARIABLE, Config, current_config
from ..errors import AccelError
from ..interfaces.launcher import Command
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
        code = run(job, current_config(), launcher)
    except AccelError as error:
        print(f"accel: {error}", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    sys.stderr.flush()
    os._exit(code)  # nothing here is worth the time that tearing down torch takes


def run(job: Job, config: Config, launcher: int) -> int:
    """Start the workers, wait for them, tell of a failure, and start them again as often as the config says.

    Returns the exit code of the run.
    """
    started, rendezvous = time.monotonic(), Rendezvous(config)
    forks = _warm_up(job, config)
    if os.getppid() != launcher:
        return 128 + signal.SIGTERM  # it ended meanwhile: nobody is left to run this for
    os.environ[STORE_VARIABLE] = "True"
    with signals.held():
        signals.adopt_orphans()
        code, stopped = _attempt(job, config, launcher, rendezvous, forks)
        for attempt in range(2, config.max_restarts + 2):
            late = config.time_limit is not None and time.monotonic() - started >= config.time_limit
            if code == 0 or stopped or late:
                break
            print(f"accel: attempt {attempt} of {config.max_restarts + 1}", file=sys.stderr, flush=True)
            rendezvous.close()  # a new one for each attempt: what the last one left in its store would mislead
            rendezvous = Rendezvous(config)
            code, stopped = _attempt(job, _with_time_left(config, started), launcher, rendezvous, forks)
    return code


def _attempt(job: Job, config: Config, launcher: int, rendezvous: Rendezvous, forks: bool) -> tuple[int, bool]:
    """Run the workers once. Returns the exit code, and whether someone has asked for the end of the run."""
    output = Prefixed() if job.prefix else None
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
    return code, supervisor.interrupted


def _with_time_left(config: Config, started: float) -> Config:
    """The config of a further attempt, whose workers are told of it by the environment."""
    if config.time_limit is not None:
        config = config.replace(time_limit=max(config.time_limit - (time.monotonic() - started), 0))
        os.environ[CONFIG_VARIABLE] = environment.handed_over(config)
    return config


def _warm_up(job: Job, config: Config) -> bool:
    """Check the device and import what all workers need. Returns whether workers can be forked after it."""
    forks = sys.platform == "linux" if job.start == "auto" else job.start == "fork"
    if not job.preload:
        return forks
    gc.disable()  # what is imported is no garbage, and looking for some takes a tenth of the time
    plan = Plan.of(config)
    device = plan.find_device().plugin.type
    if device != "cpu":
        environment.drop_allocator_settings()
    if forks and plan.processes_per_machine > 1:
        _import_for_all(job.command, crowded=plan.processes_per_machine > 2 * environment.cores())
    gc.freeze()  # what is here now stays: forks need not look at it, and so share its memory
    gc.enable()
    return forks and not _initialised(device)


def _import_for_all(command: Command, crowded: bool) -> None:
    """Import what each worker of this command would. Where it may be in vain, only if workers are many to a core."""
    trains = not command.module and b"accel" in Path(command.target).read_bytes()
    if trains:
        importlib.import_module("accel.compat.accelerator")
    if trains or crowded:
        importlib.import_module("torch._dynamo")  # the first optimizer would


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
