"""Settings as YAML text."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from accel.config import Choice, Config, Setting, load_value, one_line, render
from accel.config.text import load
from accel.errors import ConfigError

CONFIGS = [
    Config(),
    Config(num_processes=8, mixed_precision=Choice(name="fp16", options={"initial_scale": 1024.0})),
    Config(
        strategies=(Choice(name="ddp", options={"size": 2}), Choice(name="tensor")), trackers=(Choice(name="jsonl"),)
    ),
    Config(project_dir="über/no", main_process_port=29500, device=Choice(name="cuda"), even_batches=False),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip(config: Config) -> None:
    assert Config.parse(yaml.safe_load(config.dump())) == config
    assert Config.parse(yaml.safe_load(render(config.values()))) == config


def test_render_keeps_the_declared_order_and_what_it_does_not_know() -> None:
    text = render({"strange": 1, "mixed_precision": "bf16", "num_processes": 2})
    assert list(yaml.safe_load(text)) == ["num_processes", "mixed_precision", "strange"]
    assert text.startswith("# Worker processes over all machines, one per device.\nnum_processes: 2\n")
    assert "# Not a setting that accel knows.\nstrange: 1" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "here: not valid YAML: line 1, column 6: "),
        ("a: 1\nb: 2\na: 3", "here: not valid YAML: line 3, column 1: a is given twice"),
        ("x:\n  a: 1\n  a: 1", "here: not valid YAML: line 3, column 3: a is given twice"),
        ("a: \0", "here: not valid YAML: "),
    ],
)
def test_bad_yaml_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text, "here")
    assert str(caught.value).startswith(message)


def _declared(hint: Any) -> Setting:
    return Setting(name="s", type=hint, default=None, owner=Config, minimum=None, plugin=None, no=False)


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (str, "2024", "2024"),
        (str, "[x", "[x"),
        (str | None, "2024", "2024"),
        (str | None, "null", None),
        (int | None, "7", 7),
        (int | str, "7", 7),
        (bool, "true", True),
        (float, "1e-3", "1e-3"),
        (Choice, "{fp16: {initial_scale: 4}}", {"fp16": {"initial_scale": 4}}),
    ],
)
def test_text_is_read_by_the_declared_type(hint: Any, text: str, value: Any) -> None:
    assert load_value(_declared(hint), text, "s") == value


def test_one_line() -> None:
    assert one_line({"fp16": {"initial_scale": 4}}) == "{fp16: {initial_scale: 4}}"
    assert [one_line(value) for value in (1, None, "a", "no", True, [])] == ["1", "null", "a", "'no'", "true", "[]"]
