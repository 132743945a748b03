"""Finds the command that is asked for, runs it, and turns what went wrong into a message and an exit code."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from ..errors import AccelError, ConfigError, LaunchError

COMMANDS = {
    "config": "Write, change, show and check the settings of a run.",
    "launch": "Run a training script on every process of the config.",
    "checkpoints": "List, verify and delete checkpoints.",
    "merge": "Write the weights of a checkpoint into one safetensors file.",
    "test": "Try on this machine what accel promises, and print what works.",
    "env": "Print what a bug report needs: versions, hardware, settings.",
    "plugins": "List the installed plugins of every kind.",
}
"""The module of each command has the same name; it is imported only to run it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `accel` with these arguments (default: those of the process) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except AccelError as error:
        print(f"accel: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, LaunchError) else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has had enough; the flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        _overview().parse_args(arguments)
        _overview().print_help()
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(COMMANDS)}"
        raise ConfigError(f"no command {name!r}; {hint}")
    command = importlib.import_module(f".{name}", __package__)
    parser = argparse.ArgumentParser(prog=f"accel {name}", description=command.HELP, allow_abbrev=False)
    command.add_arguments(parser)
    exit_code: int = command.run(parser.parse_args(rest))
    return exit_code


def _overview() -> argparse.ArgumentParser:
    """What `accel --help` shows, and nothing of what a command does with its arguments."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {meaning}" for name, meaning in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="accel",
        usage="accel COMMAND ...",
        description="Run one unchanged PyTorch training loop on any hardware, at any scale.",
        epilog=f"commands:\n{commands}\n\n`accel COMMAND --help` explains one. New here? Run `accel config`, "
        "then `accel launch script.py`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, help="show accel's version and exit")
    return parser


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import accel

        print(f"accel {accel.__version__}")
        parser.exit()
