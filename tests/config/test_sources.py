"""Arguments > flags > environment > file > default, each value with its origin."""

from __future__ import annotations

from pathlib import Path

import pytest

from accel.config import CONFIG_VARIABLE, Config, current_config, default_path, read_file, relevant_variables, resolve
from accel.errors import ConfigError


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment in which the user's default file would be in a folder of this test."""
    return {"XDG_CONFIG_HOME": str(tmp_path)}


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_precedence_of_all_five_layers(tmp_path: Path, environ: dict[str, str]) -> None:
    file = _write(
        tmp_path / "run.yaml",
        "num_processes: 2\nmixed_precision: bf16\ngradient_accumulation_steps: 2\ndata_seed: 2\n",
    )
    environ |= {"ACCEL_MIXED_PRECISION": "fp16", "ACCEL_GRADIENT_ACCUMULATION_STEPS": "3", "ACCEL_DATA_SEED": "3"}
    resolved = resolve(file, {"gradient_accumulation_steps": 4, "data_seed": 4}, environ)
    config = resolved.config.replace(data_seed=5)
    assert (config.num_machines, config.num_processes) == (1, 2)
    assert (config.mixed_precision.name, config.gradient_accumulation_steps, config.data_seed) == ("fp16", 4, 5)
    assert {
        name: resolved.origins[name] for name in ("num_machines", "num_processes", "mixed_precision", "data_seed")
    } == {
        "num_machines": "default",
        "num_processes": str(file),
        "mixed_precision": "environment ACCEL_MIXED_PRECISION",
        "data_seed": "flag --data_seed",
    }
    assert list(resolved.origins) == list(Config().values())


def test_the_user_s_file_is_read_if_it_is_there(environ: dict[str, str]) -> None:
    assert resolve(environ=environ).config == Config()
    path = _write(default_path(environ), "num_processes: 3")
    assert resolve(environ=environ).config.num_processes == 3
    assert path.name == "default_config.yaml"


def test_a_file_can_be_named_by_a_variable(tmp_path: Path, environ: dict[str, str]) -> None:
    environ["ACCEL_CONFIG_FILE"] = str(tmp_path / "mine.yaml")
    with pytest.raises(ConfigError, match=r"mine\.yaml: no such file; `accel config --config_file .*` writes it"):
        resolve(environ=environ)
    _write(tmp_path / "mine.yaml", "num_processes: 5")
    assert resolve(environ=environ).config.num_processes == 5
    assert current_config(environ).num_processes == 1, "without a launcher there is one process"
    _write(tmp_path / "mine.yaml", "data_seed: 5")
    assert current_config(environ).data_seed == 5
    environ["ACCEL_CONFIG_FILE"] = ""
    assert resolve(environ=environ).config == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2", "expected a mapping of settings, got list: [1, 2]"),
        ("just text", "expected a mapping of settings, got str: 'just text'"),
        ("a: b: c", "not valid YAML: line 1, column 5: "),
        ("num_processes: 1\nnum_processes: 2", "not valid YAML: line 2, column 1: num_processes is given twice"),
    ],
)
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, message: str) -> None:
    file = _write(tmp_path / "bad.yaml", text)
    with pytest.raises(ConfigError) as caught:
        resolve(file, environ={})
    assert str(caught.value).startswith(f"{file}: {message}")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"project_dir: \xe9")
    for path in (tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_file(path)


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert resolve(_write(tmp_path / "empty.yaml", "# nothing\n"), environ={}).config == Config()


def test_the_layer_with_the_mistake_is_named(tmp_path: Path, environ: dict[str, str]) -> None:
    file = _write(tmp_path / "run.yaml", "num_processes: four")
    with pytest.raises(ConfigError, match=rf"^num_processes: expected int, got 'four' \(from {file}\)$"):
        resolve(file, environ=environ)
    with pytest.raises(ConfigError, match=r"\(from environment ACCEL_NUM_PROCESSES\)$"):
        resolve(environ={**environ, "ACCEL_NUM_PROCESSES": "four"})
    with pytest.raises(ConfigError, match=r"\(from flag --num_processes\)$"):
        resolve(flags={"num_processes": 0}, environ=environ)
    with pytest.raises(ConfigError, match=r"^environment ACCEL_NUM_PROCESSES: not valid YAML: "):
        resolve(environ={**environ, "ACCEL_NUM_PROCESSES": "[1"})


def test_variables_are_read_by_the_type_of_their_setting(environ: dict[str, str]) -> None:
    environ |= {
        "ACCEL_PROJECT_DIR": "2024",
        "ACCEL_MIXED_PRECISION": "no",
        "ACCEL_EVEN_BATCHES": "",
        "ACCEL_STRATEGIES": "[a, b]",
    }
    config = resolve(environ=environ).config
    assert (config.project_dir, config.mixed_precision.name, config.even_batches) == ("2024", "fp32", True)
    assert [choice.name for choice in config.strategies] == ["a", "b"]


def test_a_worker_takes_the_whole_config_of_its_launcher(environ: dict[str, str]) -> None:
    config = Config(num_processes=4, data_seed=7)
    environ |= {CONFIG_VARIABLE: config.dump(), "ACCEL_DATA_SEED": "8", "WORLD_SIZE": "2"}
    assert current_config(environ) == config


def test_a_process_started_by_another_launcher(environ: dict[str, str]) -> None:
    environ |= {"WORLD_SIZE": "4", "ACCEL_DATA_SEED": "8"}
    assert current_config(environ) == Config(num_processes=4, data_seed=8)
    with pytest.raises(ConfigError, match=r"num_processes: expected int, got 'many' \(from environment WORLD_SIZE\)"):
        current_config({**environ, "WORLD_SIZE": "many"})


def test_what_looks_like_a_secret_is_not_reported() -> None:
    environ = {"ACCEL_DATA_SEED": "1", "ACCEL_API_KEY": "s3cret", "HOME": "/", "WORLD_SIZE": "2", "TORCH_LOGS": "x"}
    assert list(relevant_variables(environ)) == ["ACCEL_DATA_SEED", "TORCH_LOGS", "WORLD_SIZE"]
