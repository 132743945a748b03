"""Inside a worker: run the user's command as python itself would, tell how it failed, end.

The command runs in a real `__main__` module, so that classes defined in a script can be pickled and data loaders
can start their own workers in any way. The process ends by `os._exit` after all that python runs at exit, since
torch's background threads can abort a process whose interpreter is torn down under them.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import importlib.util
import io
import os
import re
import sys
import threading
import time
import traceback
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import NoReturn

from ..config import Config
from ..errors import AccelError, LaunchError
from ..interfaces.launcher import Command
from ..registry import is_machinery
from . import rendezvous, signals
from .failures import Failure

_LAUNCH = str(Path(__file__).parent)
_RANK = re.compile(r"^\[rank\d+\]: ?", re.MULTILINE)
"""What torch.distributed's own hook writes before each line of a traceback; the report names the rank once."""


def run(command: Command, config: Config, rank: int, report: int, agent: int, timeout: float) -> NoReturn:
    """Be the worker of this rank, child of the process `agent`: run the command, leave a failure in `report`, end."""
    signals.die_with_parent(agent)
    faulthandler.enable(report, all_threads=False)  # a crash leaves the lines of python that led to it
    _adapt()
    status = 0
    try:
        if config.num_machines > 1:
            rendezvous.join(config, rank, timeout)
        execute(command)
    except KeyboardInterrupt:
        status = 130
    except BaseException as error:  # noqa: BLE001 - whatever ends the user's code is this worker's result
        status, text = _result(error)
        if not isinstance(error, SystemExit):
            sys.last_type = type(error)  # as python does, for those who ask at exit
        if status:
            Failure(rank, status, time.monotonic(), text).write(report)
    _end(status)


def execute(command: Command) -> None:
    """Run a command's code as `__main__`, with `sys.argv` and `sys.path` as python would have set them."""
    main, code = _module(command) if command.module else _script(command)
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


def _script(command: Command) -> tuple[ModuleType, CodeType]:
    path = os.path.abspath(command.target)
    sys.argv[:] = [command.target, *command.arguments]
    _add_to_path(os.path.dirname(os.path.realpath(path)))
    main = _new_main(path, SourceFileLoader("__main__", path), None)
    return main, compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)


def _module(command: Command) -> tuple[ModuleType, CodeType]:
    sys.argv[:] = ["-m", *command.arguments]
    _add_to_path(os.getcwd())
    spec = _find(command.target)
    if spec and spec.submodule_search_locations is not None:
        spec = _find(f"{command.target}.__main__")
    code = getattr(spec.loader, "get_code", lambda name: None)(spec.name) if spec else None
    if spec is None or spec.origin is None or code is None:
        raise LaunchError(f"-m {command.target}: no such module, or it has no code to run")
    sys.argv[0] = spec.origin
    return _new_main(spec.origin, spec.loader, spec), code


def _find(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise


def _new_main(file: str, loader: object, spec: ModuleSpec | None) -> ModuleType:
    main = ModuleType("__main__")
    main.__dict__.update(
        __file__=file,
        __loader__=loader,
        __spec__=spec,
        __package__=spec.parent if spec else None,
        __cached__=spec.cached if spec else None,
        __builtins__=sys.modules["builtins"],
        __annotations__={},
    )
    return main


def _add_to_path(folder: str) -> None:
    if not sys.flags.safe_path:
        sys.path.insert(0, folder)


def _adapt() -> None:
    """What a process that was just started has, and one forked from it, or writing to a pipe, has not."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)  # whole lines, at once, not torn among others
    if "numpy.random" in sys.modules:
        sys.modules["numpy"].random.seed()  # else all workers would draw the same


def _result(error: BaseException) -> tuple[int, str]:
    """Exit status and text for what ended the user's code."""
    if not isinstance(error, SystemExit):
        return 1, _describe(error)
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF, ""
    return 1, str(error.code)


def _describe(error: BaseException) -> str:
    """The traceback, as the user's code made it; of our own errors only the message and the user's lines."""
    error.__traceback__ = _users_part(error.__traceback__)
    if isinstance(error, AccelError):
        told = traceback.TracebackException.from_exception(error)
        lines = zip(told.stack, traceback.walk_tb(error.__traceback__), strict=True)
        told.stack = traceback.StackSummary.from_list(line for line, (frame, _) in lines if not is_machinery(frame))
        return "".join(told.format()) if told.stack else f"accel: {error}"
    with contextlib.redirect_stderr(io.StringIO()) as shown, contextlib.suppress(Exception):
        sys.excepthook(type(error), error, error.__traceback__)  # perhaps a library's, which also notes the failure
    if text := shown.getvalue():
        return _RANK.sub("", text)
    return "".join(traceback.format_exception(error))


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """The frames from the user's first one on."""
    while trace and (trace.tb_frame.f_code.co_filename.startswith((_LAUNCH, "<frozen importlib"))):
        trace = trace.tb_next
    return trace


def _end(status: int) -> NoReturn:
    """Do what python does at exit, short of tearing down the interpreter."""
    try:
        threading._shutdown()  # type: ignore[attr-defined] # waits for threads; multiprocessing ends its children so
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream and not stream.closed:
                stream.flush()
        ctypes.CDLL(None).fflush(None)
    except OSError:
        status = status or 120  # python's own code for output that could not be written
    finally:
        os._exit(status)
