"""`accel launch`: run a script on every process of a config."""

from __future__ import annotations

import argparse
import os
import sys
import typing
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from ..config import Config, Setting, describe, load_value, parse_setting, resolve
from ..errors import ConfigError
from ..interfaces.launcher import Command
from ..plan import Plan

HELP = "Run a script on every process, as the config and these flags say."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare one flag for each setting of `Config`, and what is to be run."""
    parser.usage = f"{parser.prog} [flags] script.py [arguments]\n       {parser.prog} [flags] -m module [arguments]"
    parser.add_argument("target", metavar="script.py", help="The script, or with -m the module, to run.")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="Arguments of the script.")
    parser.add_argument("-m", "--module", action="store_true", help="Run a module, as `python -m` does.")
    _add(parser, "config_file", metavar="FILE", help="The config to use instead of your default one.")
    _add(parser, "dry_run", action="store_true", help="Print what would run, as a shell script, and run nothing.")
    _add(parser, "cpu", dest="device", action="store_const", const="cpu", help="The same as --device cpu.")
    for setting in describe(Config):
        _add_setting(parser, setting)


def run(options: argparse.Namespace) -> int:
    """Check everything that can be checked, then hand over to the launcher that the config names."""
    config = resolve(options.config_file, flags(options)).config
    plan = Plan.of(config)
    command = Command(options.target, tuple(options.arguments), options.module)
    _check(command)
    launcher = plan.launcher.plugin(plan.launcher.options)
    if options.dry_run:
        print(launcher.describe(command, config))
        return 0
    return int(launcher.launch(command, config))


def _add(parser: Any, name: str, **details: Any) -> None:
    """Declare a flag, and silently the same with dashes."""
    parser.add_argument(f"--{name}", **details)
    if "_" in name:
        parser.add_argument(f"--{name.replace('_', '-')}", **{"dest": name, **details, "help": argparse.SUPPRESS})


def _add_setting(parser: argparse.ArgumentParser, setting: Setting) -> None:
    """Values are YAML, as in a file, so that `--strategy '{ddp: {bucket_size: 50}}'` works too."""

    def read(text: str) -> Any:
        return load_value(setting, text, f"flag --{setting.name}")

    def read_all(text: str) -> list[Any]:
        return [choice.dump() for choice in parse_setting(setting, read(text), setting.name)]

    details: dict[str, Any] = {"dest": setting.name, "help": setting.meaning.replace("%", "%%")}
    if setting.type is bool:
        details |= {"action": "store_const"}
        _add(parser, setting.name, **details, const=True)
        _add(parser, f"no_{setting.name}", **{**details, "help": f"Turns --{setting.name} off."}, const=False)
        return
    metavar = "NAME" if setting.plugin else setting.name.rpartition("_")[2].upper() if setting.type is str else "N"
    details |= {"metavar": metavar, "type": read}
    if typing.get_origin(setting.type) is tuple:
        _add(parser, str(setting.plugin), **details, action="append")
        also = "The same as a list, or as names with options: '{NAME: {size: 2}, NAME: {}}'."
        details |= {"action": "extend", "type": read_all, "metavar": "YAML", "help": also}
    _add(parser, setting.name, **details)


def flags(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags, as plain YAML values."""
    given = {setting.name: getattr(options, setting.name) for setting in describe(Config)}
    return {name: value for name, value in given.items() if value is not None}


def _check(command: Command) -> None:
    """Raise ConfigError if there is nothing to run: a user should not wait for torch to hear of it."""
    if command.module:
        top = command.target.partition(".")[0]
        if not PathFinder.find_spec(top, [os.getcwd(), *sys.path]):
            raise ConfigError(f"-m {command.target}: no module named {top!r}")
        return
    path = Path(command.target)
    if not path.is_file():
        kind = "a folder; name the script in it" if path.is_dir() else "no such file"
        raise ConfigError(f"{command.target}: {kind}")
