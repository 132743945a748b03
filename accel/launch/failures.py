"""What is shown of a failed run: the first culprit, once.

A worker writes its own failure, with the time, into a file that only it and the agent hold. When one rank
fails, its peers soon fail too, because they lost a peer; that says nothing about the cause and is only counted.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_LOST_PEER = re.compile(
    r"gloo/transport|Connection (closed|reset) by|DistNetworkError|DistStoreError|remote process exited"
    r"|NCCL communicator was aborted|ncclRemoteError|ncclSystemError"
)
_OURS = f'  File "{Path(__file__).parent}'
_SIGNALS = {number.value: number.name for number in signal.Signals}


@dataclass(frozen=True)
class Failure:
    """How one worker failed."""

    rank: int

    status: int
    """Its exit code, or the negative number of the signal that killed it."""

    time: float
    """When, in seconds of this machine's monotonic clock."""

    text: str = ""
    """What its user should see: a traceback, the text given to `sys.exit`, or nothing."""

    @property
    def exit_code(self) -> int:
        """The exit code by which a shell tells of this failure."""
        return self.status if self.status >= 0 else 128 - self.status

    @property
    def lost_peer(self) -> bool:
        """Whether it only says that another process has gone."""
        return bool(_LOST_PEER.search(self.text))

    @property
    def manner(self) -> str:
        """How it ended, in words."""
        if self.status >= 0:
            return "failed" if self.text else f"exited with code {self.status}"
        hint = " (as the system does when memory runs out)" if self.status == -signal.SIGKILL else ""
        return f"was killed by {_SIGNALS.get(-self.status, f'signal {-self.status}')}{hint}"

    def write(self, file: int) -> None:
        """Leave this failure in an open file, in place of what is there."""
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(asdict(self)).encode() + b"\n", 0)

    @classmethod
    def read(cls, file: int) -> Failure | None:
        """The failure that a worker left in this file, if any; the worker may be writing it just now."""
        data = _content(file)
        return cls(**json.loads(data)) if data.startswith(b"{") and data.endswith(b"\n") else None

    @classmethod
    def of_ended(cls, rank: int, status: int, time: float, file: int) -> Failure | None:
        """How a worker failed that has ended: by its own account, or its status and what a crash left in the file."""
        if told := cls.read(file):
            return told
        crash = _content(file).decode(errors="replace").partition(_OURS)[0]  # the stack's last part is how we got there
        return cls(rank, status, time, crash) if status else None


def culprit(failures: Sequence[Failure]) -> Failure:
    """The failure that came first, of those that do more than miss another process."""
    return min(failures, key=lambda failure: (failure.lost_peer, failure.time))


def report(failures: Sequence[Failure], processes: int, finished: Sequence[int] = ()) -> str:
    """What to print about a failed run. With one process that is what python itself would have printed, if anything.

    `finished` are the ranks that ended well before, which may be why another lost its peer.
    """
    first = culprit(failures)
    text = f"{first.text.rstrip()}\n" if first.text else ""
    if processes == 1:
        return text if first.status >= 0 else f"accel: the script {first.manner}\n{text}"
    told = f"accel: rank {first.rank} of {processes} {first.manner}"
    if len(failures) > 1:
        told += f"; {len(failures) - 1} more failed after it"
    if finished and first.lost_peer:
        told += f"; before that, rank {', '.join(map(str, finished))} had ended without an error"
    return f"{told}{':' if text else ''}\n{text}"


def _content(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)
