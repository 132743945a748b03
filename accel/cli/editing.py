"""Plain values on their way into a config file: changed by key, checked as a whole, written in one go."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import registry
from ..config import Choice, Config, Setting, describe, load_value, parse_setting, render
from ..errors import AccelError, ConfigError
from ..plan import Plan

SETTINGS = {declared.name: declared for declared in describe(Config)}
MAIN = ("num_processes", "mixed_precision", "strategies", "gradient_accumulation_steps")
"""A written file always says these; others only where they differ from the default."""


def plain_default(declared: Setting) -> Any:
    """The default of a setting of Config as plain YAML."""
    return shorten(declared, Config().values()[declared.name])


def shorten(declared: Setting, value: Any) -> Any:
    """The short form of a list of plugins: a single one stands alone. Other values are as they are."""
    return value[0] if declared.plugin and isinstance(value, list) and len(value) == 1 else value


def current_choices(declared: Setting, values: Mapping[str, Any]) -> list[Choice]:
    """The plugins that a setting names, or its default does. Raises ConfigError."""
    value = declared.default
    if declared.name in values:
        value = parse_setting(declared, values[declared.name], declared.name)
    return [value] if isinstance(value, Choice) else list(value or ())


def assign(values: dict[str, Any], key: str, text: str) -> None:
    """Change plain values in place: `strategies.ddp.bucket_size` and `50`. Raises ConfigError for an unknown key."""
    name, *below = key.split(".")
    declared = SETTINGS.get(name)
    if declared is None:
        Config.parse({name: text})  # raises, naming the nearest setting
    elif not below:
        parsed = Config.parse({name: load_value(declared, text, key)})
        values[name] = shorten(declared, parsed.values()[name])  # not as it was typed: `no` would come out as false
    elif declared.plugin is None or len(below) != 2:
        example = f"{name}.NAME.OPTION" if declared.plugin else name
        raise ConfigError(f"{key}: no such setting; `{example}=VALUE` would be one")
    else:
        values[name] = _with_option(declared, values, *below, text=text)


def _with_option(declared: Setting, values: Mapping[str, Any], plugin: str, option: str, *, text: str) -> Any:
    """The plain value of a plugin setting with one option changed; naming a plugin chooses it."""
    path = f"{declared.name}.{plugin}"
    options = {s.name: s for s in describe(registry.load(str(declared.plugin), plugin, declared.name).Options)}
    value = load_value(options[option], text, f"{path}.{option}") if option in options else text
    chosen = current_choices(declared, values)
    old = next((choice for choice in chosen if choice.name == plugin), Choice(name=plugin))
    new = Choice(name=plugin, options={**old.options, option: value})
    if not isinstance(declared.default, tuple):
        return new.dump()
    kept = [new if choice is old else choice for choice in chosen]
    return shorten(declared, [choice.dump() for choice in (kept if old in chosen else [*chosen, new])])


def complete(values: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What to write: the main settings, those that the file already had, and those that are not the default."""
    written = {name: plain_default(SETTINGS[name]) for name in MAIN} | dict(values)
    return {
        name: shorten(SETTINGS[name], value) if name in SETTINGS else value
        for name, value in written.items()
        if name in MAIN or name in before or name not in SETTINGS or value != plain_default(SETTINGS[name])
    }


def problems(values: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with plain values, each with its path; empty if a run can be planned from them."""
    found = [problem for name, value in values.items() for problem in _problems_of(str(name), value)]
    return list(dict.fromkeys(found or _raised(lambda: Plan.of(Config.parse(values)))))


def _problems_of(name: str, value: Any) -> list[str]:
    """What is wrong with one setting on its own."""
    wrong = _raised(Config.parse, {name: value})
    if wrong or not SETTINGS[name].plugin:
        return wrong
    choices = current_choices(SETTINGS[name], {name: value})
    return [problem for choice in choices for problem in _problems_of_choice(SETTINGS[name], choice)]


def _problems_of_choice(declared: Setting, choice: Choice) -> list[str]:
    kind, path = str(declared.plugin), f"{declared.name}.{choice.name}"
    if wrong := _raised(registry.load, kind, choice.name, declared.name):
        return wrong
    options = {s.name: s for s in describe(registry.load(kind, choice.name).Options)}
    for name, value in choice.options.items():
        if name in options:
            wrong += _raised(parse_setting, options[name], value, f"{path}.{name}")
        else:
            unknown = Choice(name=choice.name, options={name: value})
            wrong += _raised(registry.load_choice, kind, unknown, declared.name)
    return wrong + _raised(registry.load_choice, kind, choice, declared.name)


def _raised(check: Callable[..., Any], *arguments: Any) -> list[str]:
    """The message of the AccelError that a call raises; empty if it raises none."""
    try:
        check(*arguments)
    except AccelError as error:
        return [str(error)]
    return []


def write(path: Path, values: Mapping[str, Any]) -> None:
    """Write a config file whole or not at all. Raises ConfigError if the folder does not let us."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = path.resolve()  # a link to a file stays a link
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, delete=False) as file:
            file.write(render(values))
        Path(file.name).chmod(target.stat().st_mode & 0o777 if target.exists() else 0o644)
        os.replace(file.name, target)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
