"""Signals taken as events, and processes that do not outlive their parent.

While signals are held they interrupt nothing: they wait until `next_event` takes them up. A loop that waits for
processes then has one place where things happen, and no handler that runs amid a half-made change.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from types import FrameType

ENDING = (Signals.SIGINT, Signals.SIGTERM, Signals.SIGHUP)
"""Signals that ask a run to end."""

NOTICES = (Signals.SIGUSR1,)
"""Signals that tell workers something; they are passed on, and a worker that does not listen dies of them."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_SI_KERNEL = 0x80  # asm-generic/siginfo.h


@dataclass(frozen=True)
class Event:
    """A signal that came in. `from_terminal`: Ctrl-C, which the terminal sends to every process of a run alike."""

    signal: Signals
    from_terminal: bool


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold back signals while inside; what is still waiting at the end is dropped."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _events())
    try:
        yield
    finally:
        while next_event(0):
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def next_event(seconds: float) -> Event | None:
    """The next held signal (a child's end is one), or None if none comes in this time."""
    if sys.platform == "linux":
        info = signal.sigtimedwait(_events(), seconds)
        return Event(Signals(info.si_signo), info.si_code == _SI_KERNEL) if info else None
    time.sleep(seconds)
    waiting = signal.sigpending() & _events()
    return Event(Signals(signal.sigwait({waiting.pop()})), from_terminal=False) if waiting else None


def release(interrupt: Callable[[int, FrameType | None], object] | int = signal.default_int_handler) -> None:
    """Undo what a process inherits from one that holds signals.

    Ctrl-C then does what `interrupt` says, by default what it does in any python: raise KeyboardInterrupt. A
    signal that the run was told to ignore (`nohup`, a background job of a script) stays ignored.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*ENDING, *NOTICES, signal.SIGCHLD})


def die_with_parent(parent: int) -> None:
    """Have this process killed as soon as its parent, the process `parent`, has ended in whatever way."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the kernel was told
            os._exit(128 + signal.SIGKILL)
    else:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()


def adopt_orphans() -> None:
    """Make this process the parent of its descendants whose own parent ends, so that `end_orphans` finds them."""
    if sys.platform == "linux":
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_orphans(seconds: float) -> None:
    """End all children of this process: what workers that were killed have left. Linux only."""
    for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, seconds)):
        for child in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        deadline = time.monotonic() + patience
        while _reap_any() and time.monotonic() < deadline:
            time.sleep(0.01)


def _events() -> set[Signals]:
    return {s for s in (*ENDING, *NOTICES, Signals.SIGCHLD) if signal.getsignal(s) != signal.SIG_IGN}


def _reap_any() -> bool:
    """Whether this process still has children, after taking note of those that ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return bool(_children())


def _children() -> list[int]:
    listing = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    return [int(pid) for pid in listing.read_text().split()] if listing.exists() else []


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(128 + signal.SIGKILL)
