"""Plain values become frozen dataclasses, or one clear error with the path of what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from accel.config import Choice, Config, describe, parse_dataclass, setting, type_name
from accel.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A nested one."""

    depth: int = 1


@dataclass(frozen=True, kw_only=True)
class Options:
    """One setting of each type."""

    count: int = setting(1, minimum=1)
    """How many.

    And more about it.
    """
    rate: float = setting(0.5, minimum=0)
    flag: bool = False
    """Whether."""
    name: str = "x"
    mode: Literal["fast", "safe", 3] = "safe"
    limit: int | None = setting(None, minimum=1)
    size: int | Literal["auto"] = setting("auto", minimum=1)
    sizes: tuple[int, ...] = setting(())
    betas: tuple[float, float] = (0.9, 0.999)
    names: list[str] = field(default_factory=lambda: ["a"])
    extra: Mapping[str, Any] = field(default_factory=dict)
    inner: Inner = Inner()
    anything: Any = None


@dataclass(frozen=True, kw_only=True)
class Derived(Options):
    """Inherits settings and what is said of them."""

    own: int = 0
    """Its own."""


@dataclass(frozen=True, kw_only=True)
class Required:
    """Has one without a default."""

    partition: str


@pytest.mark.parametrize(
    ("name", "given", "parsed"),
    [
        ("count", 3, 3),
        ("rate", 2, 2.0),
        ("rate", "1e-3", 0.001),
        ("flag", True, True),
        ("name", "no", "no"),
        ("mode", "fast", "fast"),
        ("mode", 3, 3),
        ("limit", None, None),
        ("limit", 4, 4),
        ("size", "auto", "auto"),
        ("size", 8, 8),
        ("sizes", [1, 2], (1, 2)),
        ("sizes", [], ()),
        ("betas", [0, "1e-1"], (0.0, 0.1)),
        ("names", ["p", "q"], ["p", "q"]),
        ("extra", {"a": [1]}, {"a": [1]}),
        ("inner", {"depth": 2}, Inner(depth=2)),
        ("inner", None, Inner()),
        ("anything", {"x": 1}, {"x": 1}),
    ],
)
def test_each_type(name: str, given: Any, parsed: Any) -> None:
    value = getattr(parse_dataclass(Options, {name: given}), name)
    assert value == parsed
    assert type(value) is type(parsed)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("count", "four", "options.count: expected int, got 'four'"),
        ("count", True, "options.count: expected int, got True"),
        ("count", 1.0, "options.count: expected int, got 1.0"),
        ("count", None, "options.count: expected int, got None"),
        ("count", 0, "options.count: must be at least 1, got 0"),
        ("rate", "fast", "options.rate: expected float, got 'fast'"),
        ("rate", True, "options.rate: expected float, got True"),
        ("rate", -0.1, "options.rate: must be at least 0, got -0.1"),
        ("rate", "nan", "options.rate: must be at least 0, got 'nan'"),
        ("rate", 10**400, "options.rate: expected float, got 1000"),
        ("flag", "yes", "options.flag: expected bool, got 'yes'"),
        ("flag", 1, "options.flag: expected bool, got 1"),
        ("name", 3, "options.name: expected str, got 3"),
        ("mode", "slow", "options.mode: expected one of 'fast', 'safe', 3, got 'slow'"),
        ("mode", 3.0, "options.mode: expected one of 'fast', 'safe', 3, got 3.0"),
        ("limit", 0, "options.limit: must be at least 1, got 0"),
        ("limit", "x", "options.limit: expected int, got 'x'"),
        ("size", "big", "options.size: expected int or one of 'auto', got 'big'"),
        ("size", 0, "options.size: must be at least 1, got 0"),
        ("sizes", 3, "options.sizes: expected list of int, got 3"),
        ("sizes", [1, "b"], "options.sizes[1]: expected int, got 'b'"),
        ("betas", [0.9], "options.betas: expected list of 2 values, got [0.9]"),
        ("names", "a", "options.names: expected list of str, got 'a'"),
        ("extra", [], "options.extra: expected mapping, got []"),
        ("inner", 3, "options.inner: expected a mapping of settings, got 3"),
        ("inner", {"dpeth": 2}, "options.inner.dpeth: no such setting; did you mean 'depth'?"),
    ],
)
def test_wrong_values_are_refused_with_their_path(name: str, given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_dataclass(Options, {name: given}, "options")
    assert str(caught.value).startswith(message)


def test_an_unknown_setting_names_the_nearest_or_all() -> None:
    with pytest.raises(ConfigError, match=r"^num_proceses: no such setting; did you mean 'num_processes'\?$"):
        Config.parse({"num_proceses": 2})
    with pytest.raises(ConfigError, match=r"^zzz: no such setting; there are: num_processes, device, "):
        Config.parse({"zzz": 2})
    with pytest.raises(ConfigError, match=r"^3: no such setting"):
        Config.parse({3: 2})


@pytest.mark.parametrize("values", [[1], "num_processes", 3, True])
def test_what_is_not_a_mapping_is_refused(values: Any) -> None:
    with pytest.raises(ConfigError, match=r"^config: expected a mapping of settings, got "):
        Config.parse(values)


def test_a_setting_without_default_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"^launcher\.slurm\.partition: must be given, as str; it has no default$"):
        parse_dataclass(Required, {}, "launcher.slurm")
    assert parse_dataclass(Required, {"partition": "gpu"}).partition == "gpu"
    assert describe(Required)[0].required


@pytest.mark.parametrize("no", ["no", False])
def test_no_as_mixed_precision_is_fp32(no: Any) -> None:
    assert Config.parse({"mixed_precision": no}).mixed_precision == Choice(name="fp32")


@pytest.mark.parametrize("name", ["strategies", "launcher", "checkpoint", "device", "trackers"])
def test_no_stands_for_nothing_else(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: expected plugin name"):
        Config.parse({name: False})


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("ddp", (Choice(name="ddp"),)),
        (["ddp"], (Choice(name="ddp"),)),
        ({"ddp": None}, (Choice(name="ddp"),)),
        ({"ddp": {"size": 2}, "tensor": {}}, (Choice(name="ddp", options={"size": 2}), Choice(name="tensor"))),
        (["tensor", {"ddp": {"size": 2}}], (Choice(name="tensor"), Choice(name="ddp", options={"size": 2}))),
    ],
)
def test_plugins_are_named_in_several_ways(given: Any, parsed: Any) -> None:
    assert Config.parse({"strategies": given}).strategies == parsed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ddp": 3}, "strategies.ddp: expected a mapping of settings, got 3"),
        ([{"a": {}, "b": {}}], "strategies: expected plugin name, or one name with its options"),
        ("", "strategies: expected plugin name"),
        (None, "strategies: expected plugin name"),
    ],
)
def test_a_misnamed_plugin_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.parse({"strategies": given})
    assert str(caught.value).startswith(message)


def test_describe_reads_the_docstring_under_each_field() -> None:
    own = {s.name: s.meaning for s in describe(Options)}
    assert own["count"] == "How many.\n\nAnd more about it."
    assert own["rate"] == ""
    derived = {s.name: s.meaning for s in describe(Derived)}
    assert derived == {**own, "own": "Its own."}


def test_every_setting_of_a_run_says_what_it_means() -> None:
    assert [s.name for s in describe(Config) if not s.meaning] == []


def test_defaults_of_lists_and_mappings_are_not_shared() -> None:
    first, second = parse_dataclass(Options, {}), parse_dataclass(Options, {})
    first.names.append("b")
    assert second.names == ["a"]


def test_a_config_does_not_change() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_processes = 2  # type: ignore[misc]


def test_replace_changes_a_copy_and_checks_it() -> None:
    config = Config(num_processes=4)
    changed = config.replace(mixed_precision="bf16", strategies={"ddp": {"bucket_size": 3}})
    assert (changed.num_processes, changed.mixed_precision.name) == (4, "bf16")
    assert changed.strategies == (Choice(name="ddp", options={"bucket_size": 3}),)
    assert config.mixed_precision.name == "fp32"
    with pytest.raises(ConfigError, match=r"^num_processes: must be at least 1, got 0"):
        config.replace(num_processes=0)
    with pytest.raises(ConfigError, match=r"^mixed_precison: no such setting; did you mean 'mixed_precision'"):
        config.replace(mixed_precison="bf16")


def test_types_are_named_for_users() -> None:
    assert type_name(int | None) == "int or nothing"
    assert type_name(tuple[Choice, ...]).startswith("plugin name, or several")
