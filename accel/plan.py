"""What a run will be made of: the plugins that a config names, loaded and checked against one another.

Pure arithmetic and names: no torch, no processes. `accel launch` makes a plan before it starts a worker, and
each worker makes the same one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import registry
from .config import Choice, Config
from .errors import ConfigError
from .interfaces.strategy import MESH_ORDER, SETUP_ORDER, Axis


@dataclass(frozen=True)
class Part:
    """A plugin class, the options it will be made with, and the setting that asked for it."""

    plugin: type[Any]
    options: Any
    path: str


@dataclass(frozen=True)
class Plan:
    """The parts of a run. `strategies` are in the order in which they set up a model; `sizes` outermost first."""

    config: Config
    strategies: dict[Axis, Part]
    sizes: dict[Axis, int]
    precision: Part
    launcher: Part
    checkpoint: Part
    trackers: tuple[Part, ...]
    device: Part | None

    @classmethod
    def of(cls, config: Config) -> Plan:
        """Load and check everything that a config names. Raises ConfigError or PluginError."""
        strategies = _strategies(config.strategies)
        wanted = {axis: strategies[axis].options.size for axis in MESH_ORDER if axis in strategies}
        sizes = resolve_sizes(wanted, config.num_processes)
        if Axis.DATA not in strategies and sizes[Axis.DATA] > 1:
            raise ConfigError(
                f"strategies: {', '.join(p.path for p in strategies.values()) or 'none'} leave a data axis of "
                f"{sizes[Axis.DATA]} processes to no strategy; add one that fills it, as ddp does"
            )
        for axis, part in strategies.items():
            try:
                part.plugin.check(part.options, sizes[axis])
            except ConfigError as error:
                raise ConfigError(f"{part.path}.{error}") from None
        if config.num_processes % config.num_machines:
            raise ConfigError(
                f"num_processes: {config.num_processes} cannot be divided among num_machines: {config.num_machines}"
            )
        if config.machine_rank >= config.num_machines:
            raise ConfigError(
                f"machine_rank: {config.machine_rank} is not one of num_machines: {config.num_machines}, from 0"
            )
        return cls(
            config=config,
            strategies={axis: strategies[axis] for axis in SETUP_ORDER if axis in strategies},
            sizes=sizes,
            precision=_part("precision", config.mixed_precision, "mixed_precision"),
            launcher=_part("launcher", config.launcher, "launcher"),
            checkpoint=_part("checkpoint", config.checkpoint, "checkpoint"),
            trackers=tuple(_part("tracker", choice, "trackers") for choice in config.trackers),
            device=_part("device", config.device, "device") if config.device else None,
        )

    @property
    def processes_per_machine(self) -> int:
        """Workers that each machine runs."""
        return self.config.num_processes // self.config.num_machines

    def find_device(self) -> Part:
        """The device asked for, else the best that this machine has; checked to exist and to suffice.

        Imports torch. Raises ConfigError.
        """
        part = self.device or _best_device()
        name = part.path.rpartition(".")[2]
        available = part.plugin.count()
        if available < 1:
            raise ConfigError(f"device: {name} is not available on this machine; `accel env` lists what is")
        if self.processes_per_machine > available and not part.plugin.shared:
            raise ConfigError(
                f"num_processes: {self.processes_per_machine} on this machine, which has {available} {name} "
                f"device(s); use at most {available}, or `device: cpu`"
            )
        return part


def resolve_sizes(wanted: Mapping[Axis, int | None], processes: int) -> dict[Axis, int]:
    """Give the axes of the mesh their sizes, so that their product is the number of processes.

    An axis without a size takes what the others leave; the data axis is always there, of size 1 if need be.

    >>> resolve_sizes({Axis.DATA: None, Axis.TENSOR: 2}, 8)
    {<Axis.DATA: 'data'>: 4, <Axis.TENSOR: 'tensor'>: 2}
    """
    axes = {axis: wanted.get(axis) for axis in MESH_ORDER if axis in wanted or axis is Axis.DATA}
    known = math.prod(size for size in axes.values() if size)
    unknown = [axis for axis, size in axes.items() if size is None]
    if len(unknown) > 1 and Axis.DATA in unknown and Axis.DATA not in wanted:
        axes[Axis.DATA] = 1
        unknown.remove(Axis.DATA)
    if len(unknown) > 1:
        raise ConfigError(f"strategies: give a size to all but one of {', '.join(unknown)}")
    if unknown:
        axes[unknown[0]] = max(processes // known, 1)
    sizes = {axis: size or 1 for axis, size in axes.items()}
    if math.prod(sizes.values()) != processes:
        product = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ConfigError(
            f"strategies: {product} is {math.prod(sizes.values())} processes, but num_processes is {processes}"
        )
    return sizes


def _strategies(choices: tuple[Choice, ...]) -> dict[Axis, Part]:
    found: dict[Axis, Part] = {}
    for choice in choices:
        part = _part("strategy", choice, "strategies")
        axis = part.plugin.axis
        if axis in found:
            raise ConfigError(f"{part.path}: fills the {axis} axis, as {found[axis].path} does; keep one of them")
        found[axis] = part
    return found


def _part(kind: str, choice: Choice, path: str) -> Part:
    return Part(*registry.load_choice(kind, choice, path), path=f"{path}.{choice.name}")


def _best_device() -> Part:
    parts = [_part("device", Choice(name=name), "device") for name in registry.names("device")]
    return max((p for p in parts if p.plugin.count() > 0), key=lambda p: p.plugin.priority)
