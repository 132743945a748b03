"""How another library's objects become settings of ours: each field says which one it is, or what it must be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..config import Choice, Config
from ..errors import ConfigError


def becomes(setting: str) -> Any:
    """A field whose value, once given, is the value of this setting."""
    return field(default=None, metadata={"setting": setting})


def only(value: Any, because: str, *others: Any) -> Any:
    """A field that may only have this value, or one of `others`; `because` says why no other can be honoured."""
    return field(default=value, metadata={"allowed": (value, *others), "because": because})


@dataclass
class Translation:
    """What a script says in another library's words. Making one changes nothing; passing it to `Accelerator` does."""

    def settings(self) -> dict[str, Any]:
        """The plain settings that this stands for. Raises ConfigError naming a field that cannot be honoured."""
        found = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if "allowed" in f.metadata and value not in f.metadata["allowed"]:
                raise ConfigError(
                    f"{type(self).__name__}.{f.name}: {value!r} cannot be honoured, only {f.metadata['allowed'][0]!r}: "
                    f"{f.metadata['because']}"
                )
            if "setting" in f.metadata and value is not None:
                found[f.metadata["setting"]] = value
        return found


@dataclass
class PluginOptions(Translation):
    """Options of one plugin, for runs that use it: a run without loss scaling has no use for a scaler's options."""


def combine(sources: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The settings of several sources, each with the name it goes by. Raises ConfigError where two contradict."""
    combined: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, settings in sources:
        for key, value in settings.items():
            if key in combined and combined[key] != value:
                raise ConfigError(
                    f"{key}: {combined[key]!r} from {origin[key]} contradicts {value!r} from {name}; keep one of them"
                )
            combined[key], origin[key] = value, name
    return combined


def add_options(config: Config, options: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Config:
    """Give `{setting: {plugin: its options}}` to those plugins that the config uses, over what it says of them."""

    def extend(choice: Choice, plugins: Mapping[str, Mapping[str, Any]]) -> Choice:
        return Choice(name=choice.name, options={**choice.options, **plugins.get(choice.name, {})})

    changes: dict[str, Any] = {}
    for setting, plugins in options.items():
        used = getattr(config, setting)
        several = isinstance(used, tuple)
        changes[setting] = [extend(choice, plugins) for choice in used] if several else extend(used, plugins)
    return config.replace(**changes)
