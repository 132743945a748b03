"""`accel config`: the wizard, and the same file without questions."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import default_path, describe, one_line, read_file, render, resolve
from ..config.settings import Config
from ..errors import ConfigError
from .editing import assign, complete, problems, write
from .hardware import Detection
from .table import columns

HELP = "Write, change, show and check the settings of a run. Without a subcommand: asks, shows the file, writes it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--config_file`, before or after the subcommand, and the subcommands."""
    shared = argparse.ArgumentParser(add_help=False)
    for one, default in ((parser, None), (shared, argparse.SUPPRESS)):
        one.add_argument("--config_file", type=Path, metavar="PATH", default=default, help="not your default file")
        one.add_argument("--config-file", dest="config_file", type=Path, default=default, help=argparse.SUPPRESS)
    parser.set_defaults(action=_wizard)
    commands = parser.add_subparsers(title="subcommands", metavar="SUBCOMMAND")

    def add(action: Callable[[argparse.Namespace], int], help: str, *parents: argparse.ArgumentParser) -> Any:
        command = commands.add_parser(action.__name__[1:], help=help, description=help, parents=parents)
        command.set_defaults(action=action)
        return command

    default = add(_default, "Write what suits this machine, without asking.", shared)
    default.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    add(_show, "Print each setting and where it comes from.", shared)
    change = add(_set, "Change settings in the file, if the result can run.", shared)
    change.add_argument("changes", nargs="+", metavar="KEY=VALUE", help="as in strategies.ddp.bucket_size=50")
    add(_validate, "Say everything that is wrong with a file.").add_argument("file", type=Path, metavar="FILE")
    add(_schema, "Print the JSON Schema of config files, for editors.")


def run(options: argparse.Namespace) -> int:
    """Run the wizard or the subcommand."""
    options.named = options.config_file is not None
    options.config_file = options.config_file or default_path()
    exit_code: int = options.action(options)
    return exit_code


def _wizard(options: argparse.Namespace) -> int:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(
            "accel config asks questions and there is no terminal to ask on; "
            "run `accel config default`, then `accel config set KEY=VALUE ...`"
        )
    from .wizard import run_wizard  # the questions need prompt_toolkit, the other subcommands do not

    return run_wizard(options.config_file)


def _default(options: argparse.Namespace) -> int:
    path: Path = options.config_file
    with Detection() as detection:
        hardware = detection.wait()
    values = complete({"num_processes": hardware.processes()}, before={})
    if path.exists() and not options.overwrite and read_file(path) != values:
        raise ConfigError(
            f"{path} exists and says something else; `--overwrite` replaces it, `accel config set` changes it"
        )
    write(path, values)
    for line in hardware.describe():
        print(line, file=sys.stderr)
    print(f"{path}\n\n{render(values)}", end="")
    return 0


def _show(options: argparse.Namespace) -> int:
    resolved = resolve(options.config_file if options.named else None)
    print(f"{options.config_file}{'' if options.config_file.exists() else ' (not there)'}\n")
    values = resolved.config.values()
    print(columns([(name, one_line(value), resolved.origins[name]) for name, value in values.items()]))
    return 0


def _set(options: argparse.Namespace) -> int:
    path: Path = options.config_file
    before = read_file(path) if path.exists() else {}
    values = dict(before)
    for change in options.changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"{change}: expected KEY=VALUE, as in num_processes=2")
        assign(values, key.strip(), text.strip())
    if found := problems(values):
        raise ConfigError("; ".join(found))
    write(path, values)
    for name in values:
        if values[name] != before.get(name):
            print(f"{name}: {one_line(values[name])}")
    print(f"written to {path}")
    return 0


def _validate(options: argparse.Namespace) -> int:
    found = problems(read_file(options.file))
    for problem in found:
        print(problem, file=sys.stderr)
    if not found:
        print(f"{options.file}: ok, {len(describe(Config))} settings checked")
    return 2 if found else 0


def _schema(options: argparse.Namespace) -> int:
    from .schema import schema

    print(json.dumps(schema(), indent=2))
    return 0
