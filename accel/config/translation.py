"""How another library's words become settings of ours: each field says which one it is, or what it must be.

What a script says with an object and what a file says in a section are the same words, and are declared once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar, Self

from ..errors import ConfigError
from .parse import Choice, suggest
from .settings import Config


def becomes(setting: str) -> Any:
    """A field whose value, once given, is the value of this setting."""
    return field(default=None, metadata={"setting": setting})


def only(value: Any, because: str, *others: Any) -> Any:
    """A field that may only have this value, or one of `others`; `because` says why no other can be honoured."""
    return field(default=value, metadata={"allowed": (value, *others), "because": because})


@dataclass
class Translation:
    """What is said in another library's words. Making one changes nothing; its `settings` are what it stands for."""

    section: ClassVar[str | None] = None
    """What the user knows this as; by default the name of the class."""

    prefix: ClassVar[str] = ""
    renamed: ClassVar[Mapping[str, str]] = {}
    """What the user knows fields as: the prefix, then the other name or the field's own."""

    @classmethod
    def path(cls) -> str:
        """What error messages call this."""
        return cls.__name__ if cls.section is None else cls.section

    @classmethod
    def key(cls, name: str) -> str:
        """What a file calls a field."""
        known = cls.renamed.get(name, name)
        return cls.prefix + known.removeprefix(cls.prefix)

    @classmethod
    def where(cls, name: str) -> str:
        """The path of a field in error messages."""
        return f"{cls.path()}.{cls.key(name)}".removeprefix(".")

    @classmethod
    def read(cls, section: Any) -> Self:
        """One from a file's section. Raises ConfigError naming all keys that it does not have."""
        if not isinstance(section, Mapping):
            raise ConfigError(f"{cls.path()}: expected a mapping of settings, got {section!r}")
        known = {cls.key(f.name): f.name for f in fields(cls)}
        unknown = [f"{cls.path()}.{key}".removeprefix(".") for key in section if key not in known]
        if unknown:
            told = (f"{path}: no such setting; {suggest(path.rpartition('.')[2], list(known))}" for path in unknown)
            raise ConfigError("; ".join(told))
        return cls(**{known[key]: value for key, value in section.items()})

    def settings(self) -> dict[str, Any]:
        """The plain settings that this stands for. Raises ConfigError naming all fields that cannot be honoured."""
        values = {f: getattr(self, f.name) for f in fields(self)}
        refused = [
            f"{self.where(f.name)}: {value!r} cannot be honoured, only {f.metadata['allowed'][0]!r}: "
            f"{f.metadata['because']}"
            for f, value in values.items()
            if "allowed" in f.metadata and _plain(value) not in f.metadata["allowed"]
        ]
        if refused:
            raise ConfigError("; ".join(refused))
        return {f.metadata["setting"]: v for f, v in values.items() if "setting" in f.metadata and v is not None}


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


def _plain(value: Any) -> Any:
    """Members of torch's enums by their names, as a file has them."""
    return value.name if isinstance(value, Enum) else value
