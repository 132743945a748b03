"""Ending a run in time: on a signal to any process, or at a time limit, all stop at the same step boundary.

How they agree without a message per step: each process counts the step boundaries that it passes, and has a thread
that looks at the store, a few times a second, for whether anyone wants to stop. Once it sees that, it publishes the
count and holds its process at the next boundary. When all counts are there, the highest of them plus one is the
boundary at which all stop; who is behind still goes there, and nobody can be beyond it. So processes that are a step
apart do not wait for each other in vain, and a step costs the taking of a lock.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from types import FrameType
from typing import Any

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from ..errors import ConfigError
from .world import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send some time before they end a job."""

INTERVAL = 0.2
"""Seconds between two looks at the store."""


class Preemption:
    """Tells all processes at which step boundary to stop; made by all ranks.

    `signals` are those that ask for it; `time_limit` is in seconds from now, and `timeout` how long to wait for
    another process's count. Raises ConfigError outside of the main thread, which alone can hear signals.
    """

    def __init__(
        self, world: World, signals: Sequence[signal.Signals], time_limit: float | None, timeout: float
    ) -> None:
        self._world, self._timeout = world, timedelta(seconds=timeout)
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        self._heard = ""
        self._passed = 0
        self._answered = False
        self._target: int | None = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._before = {number: self._listen(number) for number in signals}
        self._store: Store | None = world.store("preemption") if world.size > 1 else None
        self._watcher = threading.Thread(target=self._watch, name="accel-preemption", daemon=True)
        if self._store:
            self._watcher.start()

    @property
    def reason(self) -> str:
        """Why this process, or any other, wants to stop."""
        return self._store.get("wanted").decode() if self._store else self._wanted()

    def due(self) -> bool:
        """Whether all processes stop at this step boundary; called by all ranks at each."""
        with self._lock:
            self._passed += 1
            if not self._answered:
                return self._store is None and bool(self._wanted())
        if self._target is None:
            self._target = self._agree()
        return self._passed == self._target

    def close(self) -> None:
        """Hear signals as before, and let no other process wait for this one."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if self._store and not self._closing.is_set():
            self._closing.set()
            self._watcher.join()
            self._answer()

    def _listen(self, number: signal.Signals) -> Any:
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError("save_on_signal: only the main thread hears signals; make the Accelerator there")
        return signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = signal.Signals(number).name  # and no more: this may interrupt anything, also who holds the lock

    def _wanted(self) -> str:
        """Why this process wants to stop, empty if it does not."""
        late = self._deadline is not None and time.monotonic() > self._deadline
        return self._heard or ("time_limit" if late else "")

    def _watch(self) -> None:
        assert self._store
        try:
            while not self._closing.wait(INTERVAL):
                if reason := self._wanted():
                    self._store.compare_set("wanted", "", f"{reason} on rank {self._world.rank}")
                if self._store.check(["wanted"]):
                    break
        except DistError:  # the store has gone with the process that kept it: the run is at its end
            return
        self._answer()

    def _answer(self) -> None:
        """Publish how many boundaries this process has passed, once; from then on `due` waits for the others'."""
        assert self._store
        with self._lock:
            if not self._answered:
                try:
                    self._store.set(f"passed/{self._world.rank}", str(self._passed))
                except DistError:  # as above: nobody is left to wait for the answer
                    return
                self._answered = True

    def _agree(self) -> int:
        """The boundary at which all stop; one that is never reached if another process has passed its last."""
        assert self._store
        keys = [f"passed/{rank}" for rank in range(self._world.size)]
        self._store.wait(keys, self._timeout)
        return max(int(self._store.get(key)) for key in keys) + 1
