"""The command as a whole: help, version, exit codes, and what it costs."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import accel
from accel.cli import main
from accel.cli.main import COMMANDS
from accel.errors import ConfigError, LaunchError


def _command(monkeypatch: pytest.MonkeyPatch, outcome: BaseException | int) -> list[argparse.Namespace]:
    """Stand in for `accel env` with a command that takes anything and ends like this."""
    seen: list[argparse.Namespace] = []

    def run(options: argparse.Namespace) -> int:
        seen.append(options)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    module = ModuleType("accel.cli.env")
    vars(module).update(
        HELP="Stands in.",
        add_arguments=lambda parser: parser.add_argument("rest", nargs=argparse.REMAINDER),
        run=run,
    )
    monkeypatch.setitem(sys.modules, "accel.cli.env", module)
    return seen


@pytest.mark.parametrize(
    ("outcome", "exit_code", "message"),
    [
        (0, 0, ""),
        (3, 3, ""),
        (ConfigError("num_processes: wrong"), 2, "accel: num_processes: wrong\n"),
        (LaunchError("rank 1 failed", exit_code=7), 7, "accel: rank 1 failed\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outcome: BaseException | int,
    exit_code: int,
    message: str,
) -> None:
    _command(monkeypatch, outcome)
    assert main(["env"]) == exit_code
    assert capsys.readouterr().err == message


def test_arguments_of_a_script_are_not_eaten(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _command(monkeypatch, 0)
    assert main(["env", "train.py", "--help", "--version", "--", "-x", "--config_file=a"]) == 0
    assert seen[0].rest == ["train.py", "--help", "--version", "--", "-x", "--config_file=a"]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == printed
    assert all(f"  {name} " in printed and meaning in printed for name, meaning in COMMANDS.items())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"accel {accel.__version__}\n"


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lanch", "train.py"]) == 2
    assert capsys.readouterr().err == "accel: no command 'lanch'; did you mean 'launch'?\n"


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--frob"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --frob" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_keeps_the_contract(name: str) -> None:
    command = importlib.import_module(f"accel.cli.{name}")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.HELP
    assert callable(command.run)
    assert parser.format_help()


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        ("--help", ("torch", "yaml", "questionary", "accel.config", "importlib.metadata")),
        ("plugins", ("torch", "questionary")),
        ("config show", ("torch", "questionary")),
        ("config set num_processes=2", ("torch", "questionary")),
        ("config schema", ("torch", "questionary")),
        ("checkpoints ls .", ("torch", "questionary")),
    ],
)
def test_a_command_imports_only_what_it_needs(config_path: Path, arguments: str, absent: tuple[str, ...]) -> None:
    code = (
        "import sys, atexit; from accel.cli import main\n"
        f"atexit.register(lambda: print('LOADED', [m for m in {absent!r} if m in sys.modules]))\n"
        f"assert main({arguments.split()!r}) == 0"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_a_reader_that_has_had_enough_is_no_error() -> None:
    command = f"{sys.executable} -m accel.cli plugins | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("strategy\n", "")
