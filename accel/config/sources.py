"""Where settings come from: arguments > flags > environment > file > default, each value with its origin."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .foreign import is_foreign, translate
from .parse import describe
from .settings import Config
from .text import load, load_value

CONFIG_VARIABLE = "ACCEL_CONFIG"
"""Carries the whole config from a launcher to its workers, as YAML text."""

FILE_VARIABLE = "ACCEL_CONFIG_FILE"
"""Names the config file to use instead of the user's default one."""

_RELEVANT = (
    *(
        "ACCEL_",
        "CUDA_",
        "GLOO_",
        "HIP_",
        "KMP_",
        "LD_PRELOAD",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MALLOC_CONF",
        "MASTER_",
    ),
    *("MKL_", "NCCL_", "OMP_", "PYTHONPATH", "PYTORCH_", "RANK", "ROCR_", "SLURM_", "TORCH", "WORLD_SIZE"),
)


@dataclass(frozen=True)
class Resolved:
    """A config and, for each setting, where its value came from."""

    config: Config
    origins: dict[str, str]


def default_path(environ: Mapping[str, str] = os.environ) -> Path:
    """The config file that is meant when none is named."""
    if named := environ.get(FILE_VARIABLE):
        return Path(named)
    home = environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "accel" / "default_config.yaml"


def read_file(path: Path | str) -> dict[str, Any]:
    """The plain values in a YAML file, one that `accelerate config` wrote too.

    Raises ConfigError if it cannot be read or is not a mapping, or says in other words what cannot be honoured.
    """
    try:
        text = Path(path).read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `accel config --config_file {path}` writes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    values = load(text, str(path))
    if not isinstance(values, Mapping) and values is not None:
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(values).__name__}: {values!r:.60}")
    if not values or not is_foreign(values):
        return dict(values or {})
    try:
        return translate(values)
    except ConfigError as error:
        raise ConfigError(f"{error} (from {path})") from None


def resolve(
    file: Path | str | None = None, flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ
) -> Resolved:
    """Layer flags over environment over file over defaults.

    `file` must exist if it is given; without it the user's default file is read if there is one. `flags` are
    plain YAML values by setting. Raises ConfigError, naming the layer in which a value is wrong.
    """
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if file is not None or environ.get(FILE_VARIABLE) or default_path(environ).exists():
        path = file or default_path(environ)
        layers.append((str(path), read_file(path)))
    layers.extend(_environment(environ))
    layers.extend((f"flag --{name}", {name: value}) for name, value in (flags or {}).items())
    return _resolve_layers(layers)


def current_config(environ: Mapping[str, str] = os.environ) -> Config:
    """The config of this process: what a launcher handed over, else file and environment as far as they are named."""
    if text := environ.get(CONFIG_VARIABLE):
        return Config.parse(load(text, f"environment {CONFIG_VARIABLE}"))
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if path := environ.get(FILE_VARIABLE):
        layers.append((path, read_file(path)))
    layers.extend(_environment(environ))
    world_size = load(environ.get("WORLD_SIZE") or "1", "environment WORLD_SIZE")
    layers.append(("environment WORLD_SIZE", {"num_processes": world_size}))
    return _resolve_layers(layers).config


def _resolve_layers(layers: list[tuple[str, Mapping[str, Any]]]) -> Resolved:
    """Later layers win, setting by setting; each is checked alone, so that an error can name it."""
    values: dict[str, Any] = {}
    origins = dict.fromkeys((f.name for f in fields(Config)), "default")
    for origin, layer in layers:
        try:
            Config.parse(layer)
        except ConfigError as error:
            raise ConfigError(f"{error} (from {origin})") from None
        values.update(layer)
        origins.update(dict.fromkeys(layer, origin))
    return Resolved(Config.parse(values), origins)


def relevant_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that change what a run does, for a bug report; what looks like a secret is not among them."""
    secret = ("KEY", "TOKEN", "SECRET", "PASSWORD")
    return {
        name: environ[name]
        for name in sorted(environ)
        if name.startswith(_RELEVANT) and not any(word in name for word in secret)
    }


def variable(name: str) -> str:
    """The environment variable that gives a setting."""
    return f"ACCEL_{name.upper()}"


def _environment(environ: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """One layer for each setting given as `ACCEL_<SETTING>=<YAML value>`."""
    for declared in describe(Config):
        if text := environ.get(variable(declared.name)):
            origin = f"environment {variable(declared.name)}"
            yield origin, {declared.name: load_value(declared, text, origin)}
