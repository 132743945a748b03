"""The flags of `accel launch`, what they make of the config, and what is refused before anything starts."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from accel.cli import launch, main
from accel.config import Config, describe, resolve
from accel.launch import environment

SCRIPT = "import os, sys\nsys.stdout.write(f'{os.environ[\"RANK\"]} {sys.argv[1:]}\\n')\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a script, and no config file of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="accel launch")
    launch.add_arguments(parser)
    return parser.parse_args(arguments)


def config(*flags: str) -> Config:
    return resolve(None, launch.flags(parse(*flags, "script.py")), {}).config


def test_without_flags_the_defaults_hold() -> None:
    assert launch.flags(parse("script.py")) == {}


def test_every_setting_has_a_flag() -> None:
    options = vars(parse("script.py"))
    assert {setting.name for setting in describe(Config)} <= options.keys()


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        (["--num_processes", "2"], {"num_processes": 2}),
        (["--num-processes=2"], {"num_processes": 2}),
        (["--cpu"], {"device": "cpu"}),
        (["--mixed_precision", "no"], {"mixed_precision": "fp32"}),
        (["--mixed-precision", "bf16"], {"mixed_precision": "bf16"}),
        (["--strategy", "single"], {"strategies": ["single"]}),
        (["--strategy", "{ddp: {size: 2}}"], {"strategies": [{"ddp": {"size": 2}}]}),
        (["--strategy", "ddp", "--strategy", "tensor"], {"strategies": ["ddp", "tensor"]}),
        (["--strategies", "{tensor: {size: 2}, zero3: {}}"], {"strategies": [{"tensor": {"size": 2}}, "zero3"]}),
        (["--strategies", "[ddp, tensor]"], {"strategies": ["ddp", "tensor"]}),
        (["--no_even_batches", "--split-batches"], {"even_batches": False, "split_batches": True}),
        (["--gradient_accumulation_steps", "4"], {"gradient_accumulation_steps": 4}),
        (["--main_process_ip", "10"], {"main_process_ip": "10"}),
        (["--main_process_port", "null"], {}),
    ],
)
def test_flags(flags: list[str], changes: dict[str, object]) -> None:
    assert config(*flags) == Config.parse(changes)


def test_everything_after_the_script_is_the_scripts() -> None:
    options = parse("--cpu", "script.py", "--num_processes", "8", "-m", "--help")
    assert options.arguments == ["--num_processes", "8", "-m", "--help"] and options.num_processes is None
    options = parse("-m", "package.module", "--cpu")
    assert (options.module, options.target, options.arguments, options.device) == (
        True,
        "package.module",
        ["--cpu"],
        None,
    )


def test_flags_beat_the_environment_and_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "run.yaml").write_text("num_processes: 3\nmixed_precision: bf16\ndata_seed: 1\n")
    monkeypatch.setenv("ACCEL_DATA_SEED", "2")
    assert main(["launch", "--config_file", "run.yaml", "--num_processes", "2", "--dry_run", "script.py"]) == 0
    shown = capfd.readouterr().out
    assert '"num_processes": 2, ' in shown and '"mixed_precision": "bf16"' in shown and '"data_seed": 2' in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py"], "missing.py: no such file"),
        (["home"], "home: a folder; name the script in it"),
        (["-m", "no_such_module.part"], "-m no_such_module.part: no module named 'no_such_module'"),
        (["--num_processes", "0", "script.py"], "num_processes: must be at least 1, got 0 (from flag --num_processes)"),
        (["--num_processes", "two", "script.py"], "num_processes: expected int, got 'two' (from flag --num_processes)"),
        (["--mixed_precision", "bf61", "script.py"], "mixed_precision: no precision named 'bf61' is installed; "),
        (["--strategy", "dpp", "script.py"], "strategies: no strategy named 'dpp' is installed; "),
        (["--strategy", "ddp", "--strategy", "single", "script.py"], "strategies.single: fills the data axis"),
        (["--launcher", "{local: {grac: 1}}", "script.py"], "launcher.local.grac: no such setting; did you mean"),
        (["--data_seed", "[", "script.py"], "flag --data_seed: not valid YAML: line 1, column 2: "),
        (["--strategies", "5", "script.py"], "strategies: expected plugin name, or several as a list"),
        (["--strategies", "{ddp: {}, ddp: {}}", "script.py"], "flag --strategies: not valid YAML: line 1, column 11: "),
        (["--config_file", "no.yaml", "script.py"], "no.yaml: no such file"),
        (["--num_processes", "3", "--num_machines", "2", "script.py"], "num_processes: 3 cannot be divided"),
    ],
)  # fmt: skip
def test_refusals(folder: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "home").mkdir()
    assert main(["launch", *arguments]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"accel: {message}") and shown.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--nonsense", "script.py"], ["--num_proceses", "2", "script.py"], []])
def test_unknown_flags(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["launch", *arguments])
    assert end.value.code == 2
    assert "accel launch: error: " in capfd.readouterr().err


def test_more_processes_than_devices(capfd: pytest.CaptureFixture[str]) -> None:
    """Found out in the agent, which has torch, before a worker is started."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("for machines without a CUDA device")
    assert main(["launch", "--device", "cuda", "script.py"]) == 2
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == (
        "",
        "accel: device: cuda is not available on this machine; `accel env` lists what is\n",
    )


def test_dry_run_prints_a_script_that_runs(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "accel.cli",
        "launch",
        "--cpu",
        "--num_processes",
        "2",
        "--dry_run",
        "script.py",
        "a b",
        "$c",
    ]
    dry = subprocess.run(command, capture_output=True, text=True, check=True)
    assert dry.stderr == "" and len(dry.stdout.splitlines()) == 3
    run = subprocess.run(["sh"], input=dry.stdout, capture_output=True, text=True, check=True)
    assert sorted(run.stdout.splitlines()) == ["0 ['a b', '$c']", "1 ['a b', '$c']"]


def test_cores_are_those_that_this_process_may_use() -> None:
    assert 1 <= environment.cores() <= len(os.sched_getaffinity(0))
