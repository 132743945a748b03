"""The settings of a run. A `Config` never changes once it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import yaml

from .parse import Choice, parse_dataclass, setting


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a YAML file, a flag or an argument of `Accelerator` can say about a run."""

    num_processes: int = setting(1, minimum=1)
    """Worker processes over all machines, one per device."""

    device: Choice | None = setting(None, plugin="device")
    """The hardware that each process drives; by default the best that this machine has."""

    mixed_precision: Choice = setting(Choice(name="fp32"), plugin="precision", no=True)
    """The numbers that forward and backward compute in; `no` is fp32."""

    strategies: tuple[Choice, ...] = setting((Choice(name="ddp"),), plugin="strategy")
    """How models are spread over the processes: at most one strategy for each axis of the mesh."""

    gradient_accumulation_steps: int = setting(1, minimum=1)
    """Micro-batches whose gradients are averaged into one optimizer step."""

    even_batches: bool = True
    """Give every process the same number of batches; what that repeats counts neither in gradients nor in metrics."""

    split_batches: bool = False
    """Whether the loader's batch size is that of all processes together, rather than that of each."""

    dispatch_batches: bool = False
    """Whether the main process alone reads the data and sends the others their part."""

    data_seed: int = setting(0, minimum=0)
    """Shuffling is a function of this seed and the epoch."""

    num_machines: int = setting(1, minimum=1)
    """Machines that take part; `accel launch` is run once on each."""

    machine_rank: int = setting(0, minimum=0)
    """Which of the machines this is, from 0."""

    main_process_ip: str = "127.0.0.1"
    """Address of machine 0, as the others reach it."""

    main_process_port: int | None = setting(None, minimum=1)
    """Port on machine 0 at which the processes meet; on one machine a free one is found."""

    timeout: float = setting(600.0, minimum=1)
    """Seconds that a collective call waits for the other processes before it fails."""

    launcher: Choice = setting(Choice(name="local"), plugin="launcher")
    """What starts the worker processes."""

    max_restarts: int = setting(0, minimum=0)
    """Times that `accel launch` starts the workers again, after one failed or all have saved on a signal."""

    save_on_signal: bool = False
    """On SIGTERM or SIGUSR1 to any process, all save at the same step and exit with code 75."""

    time_limit: float | None = setting(None, minimum=0)
    """Seconds after which all processes save at the same step and exit with code 75."""

    threads_per_process: int | None = setting(None, minimum=1)
    """CPU threads of each process; by default the machine's cores divided among its processes."""

    checkpoint: Choice = setting(Choice(name="safetensors"), plugin="checkpoint")
    """How `save_state` writes to disk."""

    total_limit: int | None = setting(None, minimum=1)
    """Checkpoints without a name of yours to keep; older ones are deleted once a new one is complete."""

    trackers: tuple[Choice, ...] = setting((), plugin="tracker")
    """Where `Accelerator.log` sends metrics."""

    project_dir: str = "."
    """Folder for what the run writes: logs of trackers, automatically named checkpoints."""

    @classmethod
    def parse(cls, values: Any) -> Config:
        """Make a config from plain YAML values; raises ConfigError with the path of what is wrong."""
        config: Config = parse_dataclass(cls, values)
        return config

    def replace(self, **changes: Any) -> Config:
        """A copy with some settings changed, given as in YAML."""
        return self.parse({**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, **changes})

    def values(self) -> dict[str, Any]:
        """The plain YAML values of all settings."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def dump(self) -> str:
        """This config as YAML text; `Config.parse(yaml.safe_load(text))` gives it back."""
        return yaml.safe_dump(self.values(), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Choice):
        return value.dump()
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value
