"""One plugin held against one contract of its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ... import registry
from ...config import Choice, Config
from ...plan import Plan
from ..processes import run

T = TypeVar("T")

SIZES = (1, 2, 4)
"""The numbers of processes that contracts try."""


class Skip(Exception):
    """A contract does not apply to a plugin, or cannot be checked on this machine."""


@dataclass(frozen=True)
class Case:
    """One installed plugin and one contract of its kind: a function that raises AssertionError where it is broken.

    `processes` is the most that are tried, `device` the name of the device plugin to run on, by default the best.
    """

    kind: str
    name: str
    contract: Callable[[Case], None]
    processes: int = 2
    device: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """The plugin's options, as in YAML."""

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}-{self.title.replace(' ', '_')}"

    @property
    def title(self) -> str:
        """What the contract promises, in words."""
        return self.contract.__name__.replace("_", " ")

    @property
    def plugin(self) -> type[Any]:
        """The plugin's class."""
        return registry.load(self.kind, self.name)

    @property
    def choice(self) -> Choice:
        """The plugin as a setting names it."""
        return Choice(name=self.name, options=self.options)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of processes to try."""
        return tuple(size for size in SIZES if size <= self.processes)

    @property
    def device_type(self) -> str:
        """Torch's name for the device that the case runs on. Raises ConfigError if this machine has none."""
        plan = Plan.of(Config().replace(device=self.device))
        device: str = plan.find_device().plugin.type
        return device

    def check(self) -> None:
        """Raise AssertionError if the plugin breaks the contract, Skip if that cannot be said."""
        self.contract(self)

    def make(self, *arguments: Any) -> Any:
        """An instance of the plugin with the case's options, and these further arguments."""
        plugin, options = registry.load_choice(self.kind, self.choice, self.kind)
        return plugin(options, *arguments)

    def run(self, n: int, function: Callable[..., T], *arguments: Any) -> list[T]:
        """Call the function on n processes; see `accel.testing.run`."""
        return run(n, function, *arguments, timeout=120)
