"""`accel test`: every installed plugin against the contracts of its kind, on this machine's hardware."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

from .. import registry
from ..config import Config
from ..plan import Plan

if TYPE_CHECKING:
    from ..testing.contracts import Case

HELP = "Hold every installed plugin against what its kind promises, on this machine, and print what works."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what narrows the tests: a kind, a plugin, the number of processes, the device."""
    parser.add_argument("kind", nargs="?", choices=registry.KINDS, help="test only plugins of this kind")
    parser.add_argument("name", nargs="?", help="test only the plugin of this name")
    parser.add_argument("--num_processes", type=int, help="the most processes to try; default: 2, or as many as fit")
    parser.add_argument("--device", help="the device to test on; default: the best that this machine has")


def run(options: argparse.Namespace) -> int:
    """Print one row per plugin and contract as it is done; 1 if a contract is broken, else 0. Raises ConfigError."""
    cases = _cases(options)
    width = max(len(case.name) for case in cases), max(len(case.title) for case in cases)
    statuses: Counter[str] = Counter()
    for case in cases:
        start = time.monotonic()
        status, reason = _check(case)
        statuses[status] += 1
        row = f"{case.kind:10}  {case.name:{width[0]}}  {case.title:{width[1]}}  {status:7}  "
        print(f"{row}{time.monotonic() - start:5.1f} s  {reason}".rstrip(), flush=True)
    print(", ".join(f"{count} {status}" for status, count in sorted(statuses.items())))
    return 1 if statuses["failed"] else 0


def _cases(options: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for, with everything that they name checked before the first is run."""
    from ..testing import contracts  # imports torch

    if options.name:
        registry.load(options.kind, options.name)
    processes = options.num_processes if options.num_processes is not None else _default_processes(options.device)
    Plan.of(Config().replace(num_processes=processes, device=options.device)).find_device()
    return contracts.cases(options.kind, options.name, processes=processes, device=options.device)


def _default_processes(device: str | None) -> int:
    """Two, or one where each process needs a device of its own and there is but one."""
    plugin = Plan.of(Config().replace(device=device)).find_device().plugin
    return 2 if plugin.shared or plugin.count() > 1 else 1


def _check(case: Case) -> tuple[str, str]:
    """`ok`, `failed` or `skipped`, and why. The traceback of what is no broken promise goes to standard error."""
    from ..testing.contracts import Skip

    try:
        case.check()
    except Skip as reason:
        return "skipped", _line(reason)
    except AssertionError as broken:
        return "failed", _line(broken)
    except Exception as error:  # noqa: BLE001 - a plugin may raise anything, and the others are tested all the same
        print("".join(getattr(error, "__notes__", [])), file=sys.stderr)
        return "failed", f"{type(error).__name__}: {_line(error)}"
    return "ok", ""


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]
