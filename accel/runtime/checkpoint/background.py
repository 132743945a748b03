"""One thing done behind the training; what goes wrong with it is raised when it is waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ...errors import CheckpointError


class Background:
    """A thread at a time. `what` says in errors what was not done."""

    def __init__(self, name: str, what: str) -> None:
        self.name, self.what = name, what
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def start(self, act: Callable[[], None]) -> None:
        """Begin; what was begun before must have been waited for."""

        def run() -> None:
            try:
                act()
            except Exception as error:  # noqa: BLE001 - `wait` raises it
                self._failure = error

        self._thread = threading.Thread(target=run, name=self.name)
        try:
            self._thread.start()
        except RuntimeError:  # while Python ends, it starts no threads
            self._thread = None
            run()

    def wait(self) -> None:
        """Until it is done. Raises CheckpointError if it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise CheckpointError(f"{self.what}: {failure}") from failure
