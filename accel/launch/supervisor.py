"""Waiting for workers: one loop, in which everything that happens is a reason to send them a signal, now or later."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Sequence
from signal import Signals

from ..interfaces.launcher import PREEMPTED
from . import failures, signals
from .failures import Failure
from .workers import Worker

TICK = 0.1
"""Seconds between two looks at what does not announce itself by a signal."""

SETTLE = 0.2
"""Seconds after the first failure in which a peer's may come to light that was its cause."""


class Supervisor:
    """Waits for workers, and ends those that are left at the first failure, at a signal, or without its launcher."""

    def __init__(self, workers: Sequence[Worker], launcher: int, grace: float) -> None:
        self.workers, self.launcher, self.grace = {w.pid: w for w in workers}, launcher, grace
        self.failures: list[Failure] = []
        """Of the workers that failed by themselves."""
        self.finished: list[int] = []
        """Ranks that ended well by themselves."""
        self._asked: Signals | None = None
        self._orphaned = False
        self._settled = math.inf
        """When the rest is ended because of a failure: what fails later fails because of that."""
        self._due: list[tuple[float, Signals]] = []
        """When to send which signal to the workers that are left."""

    def wait(self, each_tick: Callable[[], object]) -> int:
        """Wait until no worker is left. Returns the exit code of the run: PREEMPTED if all saved and stopped."""
        while any(worker.status is None for worker in self.workers.values()):
            self._take(signals.next_event(TICK))
            self._reap()
            self._look()
            self._send_due()
            each_tick()
        if self._asked or self._orphaned or self.failures:
            signals.end_orphans(self.grace)
        statuses = {worker.status or 0 for worker in self.workers.values()}
        if statuses == {PREEMPTED}:
            return PREEMPTED
        if self._asked:
            return 128 + self._asked
        return failures.culprit(self.failures).exit_code if self.failures else max(statuses)

    @property
    def interrupted(self) -> bool:
        """Whether someone has asked for the end, or the launcher is gone; takes a moment to look."""
        self._take(signals.next_event(TICK))
        return self._asked is not None or os.getppid() != self.launcher

    def _take(self, event: signals.Event | None) -> None:
        """Pass a signal on to the workers. Only Ctrl-C has a deadline: who sends SIGTERM follows it up."""
        if event and event.signal in signals.NOTICES:
            self._send(event.signal)
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
        self.failures = [f for w in self.workers.values() if (f := w.failure) and f.status != PREEMPTED]
        self.finished = [w.rank for w in self.workers.values() if w.status == 0]
        if self.failures and self._settled == math.inf:
            self._settled = now + SETTLE
            self._end(self._settled)

    def _end(self, at: float) -> None:
        self._due = [(at, Signals.SIGTERM), (at + self.grace, Signals.SIGKILL)]

    def _send_due(self) -> None:
        while self._due and time.monotonic() >= self._due[0][0]:
            self._send(self._due.pop(0)[1])

    def _send(self, number: Signals) -> None:
        for worker in self.workers.values():
            worker.send(number)
