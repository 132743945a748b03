"""The rank in front of each line that workers print.

By default workers inherit the terminal: nothing stands between a progress bar and the user. With prefixes they
write into pipes instead, and a thread of the agent copies line by line what comes out.
"""

from __future__ import annotations

import os
import re
import selectors
import threading
from dataclasses import dataclass

_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)")  # a carriage return ends a line too: progress bars use no other


@dataclass
class _Pipe:
    source: int
    target: int
    prefix: bytes
    rest: bytes = b""

    def copy(self) -> bool:
        """Write out the lines that have come in. Returns False once there will be no more."""
        data = os.read(self.source, 1 << 16)
        lines = _LINE.findall(self.rest + data)
        self.rest = (self.rest + data)[sum(map(len, lines)) :]
        if not data and self.rest:
            lines.append(self.rest + b"\n")
        text = b"".join(line if line == b"\r" else self.prefix + line for line in lines)
        while text:
            text = text[os.write(self.target, text) :]
        return bool(data)


class Prefixed:
    """Standard output and error of workers, copied with the rank in front of each line."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._copy, daemon=True)

    def open(self, rank: int) -> tuple[int, int]:
        """Where a worker shall write its output and its errors: two open files, to be closed here once it has them."""
        ends = []
        for target in (1, 2):
            source, end = os.pipe()
            self._selector.register(source, selectors.EVENT_READ, _Pipe(source, target, b"[%d] " % rank))
            ends.append(end)
        return ends[0], ends[1]

    def start(self) -> None:
        """Begin to copy; once all workers are made, since a process with threads should not be forked."""
        self._thread.start()

    def finish(self, seconds: float) -> None:
        """Wait until everything is copied; no longer than this, for others may hold the files still."""
        self._thread.join(seconds)

    def _copy(self) -> None:
        while self._selector.get_map():
            for key, _ in self._selector.select():
                if not key.data.copy():
                    self._selector.unregister(key.fileobj)
                    os.close(key.fd)
