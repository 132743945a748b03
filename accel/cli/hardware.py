"""What this machine has, found out by a child process: device plugins need torch, and nobody should wait for it.

`Detection` starts the child at once; by the time that its answer is wanted, it is often there.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

from .. import registry
from ..config import Choice
from ..errors import AccelError

TIMEOUT = 60
"""Seconds after which a driver that does not answer is given up."""


@dataclass(frozen=True)
class Found:
    """What a device plugin says of this machine; `problem` is why it cannot say."""

    count: int = 0
    priority: int = 0
    shared: bool = False
    problem: str = ""


@dataclass(frozen=True)
class Hardware:
    """The devices by plugin name, and how well the best of them computes in each precision."""

    devices: dict[str, Found] = field(default_factory=dict)
    support: dict[str, str] = field(default_factory=dict)
    problem: str = ""

    @property
    def best(self) -> str | None:
        """The device that a run takes if none is asked for."""
        available = [name for name, found in self.devices.items() if found.count > 0]
        return max(available, key=lambda name: self.devices[name].priority, default=None)

    def processes(self, device: str | None = None) -> int:
        """One process for each device; a single one where processes share the device."""
        found = self.devices.get(device or self.best or "", Found())
        return 1 if found.shared else max(found.count, 1)

    def describe(self) -> list[str]:
        """One line for each device that is there, and one for each problem."""
        counts = ", ".join(f"{found.count} x {name}" for name, found in self.devices.items() if found.count)
        lines = [f"this machine has {counts}"] if counts else []
        problems = {found.problem: None for found in self.devices.values() if found.problem}
        return lines + [f"({problem})" for problem in [*problems, self.problem] if problem]


class Detection:
    """A running child process that looks at the hardware. Leaving the `with` block ends it."""

    def __enter__(self) -> Detection:
        command = [sys.executable, "-P", "-m", __name__]  # -P: a folder here called torch is not torch
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._child.kill()
        self._child.communicate()

    def wait(self) -> Hardware:
        """What the child found; never raises, what went wrong is its `problem`."""
        try:
            output, errors = self._child.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return Hardware(problem=f"the hardware did not answer within {TIMEOUT} s")
        if self._child.returncode:
            reason = (errors.strip().splitlines() or ["no message"])[-1]
            return Hardware(problem=f"the hardware could not be looked at: {reason}")
        answer: dict[str, Any] = json.loads(output.splitlines()[-1])  # a plugin may print lines of its own before
        devices = {name: Found(**found) for name, found in answer.pop("devices").items()}
        return Hardware(devices=devices, **answer)


def detect() -> Hardware:
    """Look at the hardware in this process; imports torch."""
    devices = {name: _look(name) for name in registry.names("device")}
    hardware = Hardware(devices)
    return Hardware(devices, support=_support(hardware.best) if hardware.best else {})


def _look(name: str) -> Found:
    try:
        plugin = registry.load("device", name)
        return Found(plugin.count(), plugin.priority, plugin.shared)
    except ModuleNotFoundError as error:
        return Found(problem=f"{error.name} is not installed: `pip install {error.name}`, then look again")
    except AccelError as error:
        return Found(problem=str(error))
    except Exception as error:  # noqa: BLE001 - one broken driver must not hide the other devices; it is reported
        return Found(problem=f"{name}: {type(error).__name__}: {error}")


def _support(device: str) -> dict[str, str]:
    """How the device computes in each precision's dtype; empty without torch."""
    try:
        torch = importlib.import_module("torch")  # only ever in the child
    except ModuleNotFoundError:
        return {}
    hardware, support = registry.load("device", device)(), {}
    for name in registry.names("precision"):
        try:
            plugin, _ = registry.load_choice("precision", Choice(name=name), "mixed_precision")
        except AccelError:
            continue  # whoever asks for this precision is told why
        support[name] = str(hardware.support(getattr(torch, plugin.dtype)))
    return support


if __name__ == "__main__":
    print("\n" + json.dumps(asdict(detect())))
