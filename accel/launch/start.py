"""The launcher's side: start the agent, pass signals on to it, return how the run ended."""

from __future__ import annotations

import os
import subprocess
import sys
from signal import Signals

from ..plan import Plan
from . import environment, signals
from .job import Job, python


def run(job: Job, plan: Plan) -> int:
    """Run a job's workers on this machine and return the exit code: 0, the first failure's, or 128 + a signal."""
    with signals.held():
        command = python("accel.launch.agent", "main", [str(os.getpid()), job.dump()])
        agent = subprocess.Popen(command, env={**os.environ, **environment.changes(plan)})
        while (status := agent.poll()) is None:
            event = signals.next_event(1.0)
            if event and event.signal in (*signals.ENDING, *signals.NOTICES) and not event.from_terminal:
                agent.send_signal(event.signal)
    if status < 0 and -status not in signals.ENDING:
        print(f"accel: the agent, which runs the workers, was killed by {Signals(-status).name}", file=sys.stderr)
    return status if status >= 0 else 128 - status
