"""`accel env`: what a bug report needs, as one block to paste. Works where torch is missing or a setting is wrong."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import registry
from ..config import default_path, one_line, relevant_variables, resolve
from ..errors import ConfigError
from .editing import problems
from .hardware import Detection, Hardware
from .table import columns

HELP = "Print versions, hardware, settings and variables as a block to paste into a bug report."
PACKAGES = ("accel-torch", "torch", "numpy", "pyyaml", "questionary", "safetensors", "tqdm", "xxhash")

Rows = Sequence[tuple[str, ...]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--config_file`."""
    parser.add_argument("--config_file", type=Path, metavar="PATH", help="the config to report")


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    with Detection() as detection:
        sections = [_versions(), _machine(), *_settings(options.config_file), _variables()]
        sections.insert(2, _devices(detection.wait()))
    print("```text\n" + "\n\n".join(columns(rows) for rows in sections if rows) + "\n```")
    return 0


def _versions() -> Rows:
    """accel's own packages, and those that brought plugins."""
    packages = dict.fromkeys([*PACKAGES, *sorted({entry.package for entry in registry.listings()})])
    home = str(Path(__file__).parent.parent)
    return [("python", f"{platform.python_version()} ({sys.executable})")] + [
        (name, _version(name) + (f" ({home})" if name == PACKAGES[0] else "")) for name in packages
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _machine() -> Rows:
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return [
        ("system", platform.platform()),
        ("cpu", f"{_cpu_model()}, {cores} cores, {usable} of them for this process"),
        ("memory", f"{memory:.1f} GiB"),
    ]


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text("utf-8").splitlines() if information.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _devices(hardware: Hardware) -> Rows:
    rows = [(f"device {name}", found.problem or f"count {found.count}") for name, found in hardware.devices.items()]
    rows += [(f"precision {name}", f"{support} on {hardware.best}") for name, support in hardware.support.items()]
    return rows + ([("hardware", hardware.problem)] if hardware.problem else [])


def _settings(file: Path | None) -> list[Rows]:
    """The path of the config file with what is wrong, then every setting with its origin."""
    path = file or default_path()
    where = [("config file", f"{path}{'' if path.exists() else ' (not there)'}")]
    try:
        resolved = resolve(file)
    except ConfigError as error:
        return [[*where, ("problem", str(error))]]
    values = resolved.config.values()
    where += [("problem", problem) for problem in problems(values)]
    return [where, [(name, one_line(value), resolved.origins[name]) for name, value in values.items()]]


def _variables() -> Rows:
    return [(name, value) for name, value in relevant_variables().items()]
