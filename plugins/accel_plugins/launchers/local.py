"""Workers on this machine; for several machines, `accel launch` is run once on each."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from typing import Literal

from accel.config import Config, setting
from accel.errors import ConfigError
from accel.interfaces import Launcher
from accel.interfaces.launcher import Command
from accel.launch import environment, rendezvous, start
from accel.launch.job import Job
from accel.plan import Plan


class Local(Launcher):
    """Starts the workers of this machine, forked from one process that has imported torch."""

    @dataclass(frozen=True, kw_only=True)
    class Options(Launcher.Options):
        """The settings of `local`."""

        preload: bool = True
        """Import torch once for all workers, rather than in each."""

        start: Literal["auto", "fork", "exec"] = "auto"
        """How workers are made: forked where that is safe, or each started as a new process."""

        prefix: bool = False
        """Write the rank in front of each line that a process prints; progress bars then see no terminal."""

        grace: float = setting(0.75, minimum=0)
        """Seconds that workers have to end by themselves, after Ctrl-C or another's failure, before they are killed."""

        timeout: float = setting(300.0, minimum=1)
        """Seconds to wait for the other machines."""

    options: Options

    def launch(self, command: Command, config: Config) -> int:
        """Run the command on this machine's processes; see `Launcher.launch`."""
        rendezvous.check_port(config)
        if config.max_restarts and config.num_machines > 1:
            raise ConfigError(
                f"max_restarts: {config.max_restarts} needs num_machines 1, got {config.num_machines}: the machines do "
                "not restart together; let the scheduler start all of them again, and call accelerator.resume()"
            )
        options = self.options
        job = Job(
            command=command,
            preload=options.preload,
            start=options.start,
            prefix=options.prefix,
            grace=options.grace,
            timeout=options.timeout,
        )
        return start.run(job, Plan.of(config))

    def describe(self, command: Command, config: Config) -> str:
        """A shell script that runs the workers, one a line. Its port is free now, but not kept free."""
        plan, port = Plan.of(config), rendezvous.check_port(config) or rendezvous.free_port()
        shared = environment.changes(plan)
        lines = []
        for local_rank in range(plan.processes_per_machine):
            variables = {**environment.for_worker(config, local_rank, port), **shared}
            settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
            lines.append(f"{settings} {shlex.join(command.argv(sys.executable))}")
        return " &\n".join(lines) + ("\nwait" if len(lines) > 1 else "")
