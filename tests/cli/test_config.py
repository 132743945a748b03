"""`accel config` without its questions: default, show, set, validate."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml

from accel.cli import main


@pytest.fixture
def saved(config_path: Path) -> Any:
    """Read what is in the user's file, or write it first."""

    def access(text: str | None = None) -> Any:
        if text is not None:
            config_path.parent.mkdir(parents=True, exist_ok=True)
            config_path.write_text(text)
        return yaml.safe_load(config_path.read_text())

    return access


def test_without_a_terminal_the_wizard_says_what_to_run(
    config_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n\n"))
    assert main(["config"]) == 2
    assert "run `accel config default`, then `accel config set KEY=VALUE ...`" in capsys.readouterr().err
    assert not config_path.exists()


def test_default_writes_what_suits_the_machine(
    config_path: Path, saved: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "default"]) == 0
    assert saved().keys() == {"num_processes", "mixed_precision", "strategies", "gradient_accumulation_steps"}
    output = capsys.readouterr()
    assert str(config_path) in output.out
    assert "this machine has" in output.err
    assert main(["config", "default"]) == 0, "the same again is no conflict"


def test_default_does_not_overwrite_unasked(config_path: Path, saved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    saved("data_seed: 7\n")
    assert main(["config", "default"]) == 2
    assert "`--overwrite` replaces it" in capsys.readouterr().err
    assert saved() == {"data_seed": 7}
    assert main(["config", "default", "--overwrite"]) == 0
    assert "data_seed" not in saved()


def test_show_prints_each_value_with_its_origin(
    config_path: Path, saved: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("num_processes: 2\nmixed_precision: {fp16: {initial_scale: 1024}}\n")
    monkeypatch.setenv("ACCEL_DATA_SEED", "9")
    assert main(["config", "show"]) == 0
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in capsys.readouterr().out.splitlines() if line}
    assert lines["num_processes"] == f"2 {config_path}"
    assert lines["mixed_precision"] == f"{{fp16: {{initial_scale: 1024}}}} {config_path}"
    assert lines["data_seed"] == "9 environment ACCEL_DATA_SEED"
    assert lines["num_machines"] == "1 default"


@pytest.mark.parametrize("order", [["--config_file", "FILE", "show"], ["show", "--config_file", "FILE"]])
def test_show_takes_another_file(
    tmp_path: Path, config_path: Path, capsys: pytest.CaptureFixture[str], order: list[str]
) -> None:
    file = tmp_path / "other.yaml"
    assert main(["config", *(str(file) if word == "FILE" else word for word in order)]) == 2
    assert f"{file}: no such file" in capsys.readouterr().err
    file.write_text("num_processes: 6\n")
    assert main(["config", *(str(file) if word == "FILE" else word for word in order)]) == 0
    assert str(file) in capsys.readouterr().out


def test_set_changes_what_is_named_and_nothing_else(saved: Any) -> None:
    saved("# mine\ndata_seed: 0\nproject_dir: runs\nmixed_precision: bf16\n")
    arguments = ["num_processes=2", "strategies.ddp.bucket_size=50", "mixed_precision.fp16.initial_scale=1024"]
    assert main(["config", "set", *arguments]) == 0
    assert saved() == {
        "num_processes": 2,
        "mixed_precision": {"fp16": {"initial_scale": 1024}},
        "strategies": {"ddp": {"bucket_size": 50}},
        "data_seed": 0,
        "project_dir": "runs",
    }
    assert main(["config", "set", "strategies.ddp.static_graph=true", "project_dir=2024", "device=cpu"]) == 0
    assert saved()["strategies"] == {"ddp": {"bucket_size": 50, "static_graph": True}}
    assert saved()["project_dir"] == "2024"
    assert saved()["device"] == "cpu"
    assert main(["config", "set", "mixed_precision=no", "trackers={jsonl: {}}", "device=null"]) == 0
    assert [saved()[name] for name in ("mixed_precision", "trackers", "device")] == ["fp32", "jsonl", None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("num_proceses=2", "num_proceses: no such setting; did you mean 'num_processes'?"),
        ("num_processes=two", "num_processes: expected int, got 'two'"),
        ("num_processes=0", "num_processes: must be at least 1, got 0"),
        ("num_processes", "num_processes: expected KEY=VALUE"),
        ("num_processes.x=2", "num_processes.x: no such setting; `num_processes=VALUE` would be one"),
        ("strategies.ddp=2", "strategies.ddp: no such setting; `strategies.NAME.OPTION=VALUE` would be one"),
        ("strategies.ddp.bucket=2", "strategies.ddp.bucket: no such setting; did you mean 'bucket_size'?"),
        ("strategies.dpd.bucket=2", "strategies: no strategy named 'dpd' is installed; there are: "),
        ("strategies.single.size=1", "strategies.single: fills the data axis, as strategies.ddp does"),
        ("mixed_precision=int3", "mixed_precision: no precision named 'int3' is installed"),
        ("mixed_precision=[", "mixed_precision: not valid YAML: "),
        ("machine_rank=1", "machine_rank: 1 is not one of num_machines: 1"),
    ],
)
def test_set_refuses_what_would_not_run(
    saved: Any, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    saved("data_seed: 3\n")
    assert main(["config", "set", "data_seed=4", change]) == 2
    assert capsys.readouterr().err.startswith(f"accel: {message}")
    assert saved() == {"data_seed": 3}


def test_set_keeps_a_link_and_the_permissions_of_the_file(tmp_path: Path, config_path: Path) -> None:
    target = tmp_path / "target.yaml"
    target.write_text("num_processes: 1\n")
    target.chmod(0o600)
    config_path.parent.mkdir(parents=True)
    config_path.symlink_to(target)
    assert main(["config", "set", "num_processes=2"]) == 0
    assert config_path.is_symlink()
    assert "num_processes: 2" in target.read_text()
    assert target.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.glob("tmp*")) == []


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    assert main(["config", "set", "--config_file", str(tmp_path / "taken" / "x.yaml"), "num_processes=2"]) == 2
    assert "x.yaml: cannot be" in capsys.readouterr().err


def test_validate_says_ok(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("num_processes: 2\nmixed_precision: no\nstrategies: {ddp: {bucket_size: 3}}\n")
    assert main(["config", "validate", str(file)]) == 0
    assert capsys.readouterr().out.startswith(f"{file}: ok")


def test_validate_prints_every_problem_with_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "num_processes: four\nmixed_precision: {fp16: {initial_scale: big, windw: 3}}\n"
        "strategies: {ddp: {bucket_size: -1}, nowhere: {}}\ncolour: red\n"
    )
    assert main(["config", "validate", str(file)]) == 2
    problems = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in problems] == [
        "num_processes",
        "mixed_precision.fp16.initial_scale",
        "mixed_precision.fp16.windw",
        "strategies.ddp.bucket_size",
        "strategies",
        "colour",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "expected a mapping of settings"),
        ("num_processes: 3\nstrategies: single", "strategies.single.size: "),
        ("num_processes: 3\nnum_machines: 2", "num_processes: 3 cannot be divided among num_machines: 2"),
    ],
)
def test_validate_checks_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main(["config", "validate", str(file)]) == 2
    assert message in capsys.readouterr().err
