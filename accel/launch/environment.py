"""What the processes of a run find in their environment. Launchers write these variables; nothing here reads one."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..config import CONFIG_VARIABLE, Config
from ..plan import Plan

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "1048576",
    "MALLOC_TRIM_THRESHOLD_": "1048576",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""For tensors in main memory: glibc by default keeps what is freed, which can double a training job's memory.

From 1 MiB on, memory goes back to the system when it is freed; huge pages take away nearly all that this costs.
"""


def changes(plan: Plan) -> dict[str, str]:
    """What a run adds to this process's environment, before a worker starts; what the user has set there stays."""
    defaults = {"OMP_NUM_THREADS": str(max(cores() // plan.processes_per_machine, 1))}
    if plan.device is None or plan.device.plugin.type == "cpu":
        defaults |= ALLOCATOR
    asked = {CONFIG_VARIABLE: handed_over(plan.config)}
    if plan.config.threads_per_process:
        asked["OMP_NUM_THREADS"] = str(plan.config.threads_per_process)
    return {name: value for name, value in defaults.items() if name not in os.environ} | asked


def handed_over(config: Config) -> str:
    """A config as workers find it: JSON, which is on one line, and YAML too."""
    return json.dumps(config.values())


def local_size(config: Config) -> int:
    """Workers on each machine."""
    return config.num_processes // config.num_machines


def rank(config: Config, local_rank: int) -> int:
    """The rank of one of this machine's workers among all."""
    return config.machine_rank * local_size(config) + local_rank


def for_worker(config: Config, local_rank: int, port: int) -> dict[str, str]:
    """What tells one worker who it is and where the processes meet: torch's own variables."""
    return {
        "RANK": str(rank(config, local_rank)),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(config.num_processes),
        "LOCAL_WORLD_SIZE": str(local_size(config)),
        "MASTER_ADDR": config.main_process_ip,
        "MASTER_PORT": str(port),
    }


def cores() -> int:
    """CPU cores that this process may use, which a container or a scheduler may have limited."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000": microseconds of each period, or "max 100000"
    if quota.exists():
        share, _, period = quota.read_text().partition(" ")
        if share != "max":
            allowed = min(allowed, -(-int(share) // int(period)))
    return max(allowed, 1)


def drop_allocator_settings() -> None:
    """Take our allocator settings back: the run turned out to compute elsewhere than in main memory."""
    for name, value in ALLOCATOR.items():
        if os.environ.get(name) == value:
            del os.environ[name]
