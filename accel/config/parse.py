"""From plain YAML values to frozen dataclasses, by the types that the dataclasses declare.

One declaration serves everything: validation here, and through `describe` the wizard's questions, the flags of
`accel launch`, the JSON Schema and the tables in the docs. It holds for `Config` and for every plugin's `Options`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A plugin by name, with its own options: in YAML `ddp`, or `ddp: {bucket_size: 50}`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def dump(self) -> Any:
        """The plain YAML value of this choice."""
        return {self.name: dict(self.options)} if self.options else self.name


@dataclass(frozen=True)
class Setting:
    """One field of a settings dataclass, as a wizard, a flag parser or a schema needs to see it."""

    name: str
    type: Any
    default: Any
    owner: type
    minimum: float | None
    plugin: str | None
    no: bool

    @property
    def meaning(self) -> str:
        """The docstring under the field; only help needs it, so that training never reads the source."""
        return _meanings(self.owner).get(self.name, "")

    @property
    def required(self) -> bool:
        """Whether it has no default, so that it must be given."""
        return self.default is dataclasses.MISSING


def setting(default: Any, *, minimum: float | None = None, plugin: str | None = None, no: bool = False) -> Any:
    """A dataclass field with a default; optionally its smallest value, or the kind of plugin that it names.

    `no=True` lets an explicit `no` (or false, as which YAML reads it) stand for the default.
    """
    metadata = {"minimum": minimum, "plugin": plugin, "no": no}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@functools.cache
def describe(cls: type) -> tuple[Setting, ...]:
    """The settings that a dataclass declares, in order; the meaning of each is the docstring under its field."""
    hints = typing.get_type_hints(cls)
    return tuple(
        Setting(
            name=f.name,
            type=hints[f.name],
            default=f.default_factory() if callable(f.default_factory) else f.default,
            owner=cls,
            minimum=f.metadata.get("minimum"),
            plugin=f.metadata.get("plugin"),
            no=f.metadata.get("no", False),
        )
        for f in dataclasses.fields(cls)
    )


def parse_dataclass(cls: type, values: Any, path: str = "") -> Any:
    """Make the settings dataclass `cls` from a mapping. Raises ConfigError with the path of what is wrong."""
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'config'}: expected a mapping of settings, got {values!r}")
    known = {s.name: s for s in describe(cls)}
    parsed = {}
    for name, value in values.items():
        where = f"{path}.{name}" if path else str(name)
        if name not in known:
            raise ConfigError(f"{where}: no such setting; {suggest(str(name), list(known))}")
        parsed[name] = parse_setting(known[name], value, where)
    for name in known.keys() - parsed.keys():
        if known[name].required:
            raise ConfigError(f"{path}.{name}: must be given, as {type_name(known[name].type)}; it has no default")
    try:
        return cls(**parsed)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") if path else error from None


def parse_setting(declared: Setting, value: Any, path: str) -> Any:
    """A plain YAML value as the type that a setting declares. Raises ConfigError that begins with `path`."""
    if declared.no and (value is False or value == "no"):
        return declared.default
    parsed = _parse(declared.type, value, path)
    number = isinstance(parsed, (int, float))
    if declared.minimum is not None and number and not parsed >= declared.minimum:  # not >=, for NaN
        raise ConfigError(f"{path}: must be at least {declared.minimum:g}, got {value!r}")
    return parsed


def type_name(hint: Any) -> str:
    """A type as users read it: `int`, `one of 'a', 'b'`, `list of str`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("nothing" if a is type(None) else type_name(a) for a in arguments)
    if origin in (tuple, list):
        if arguments[0] is Choice:
            return "plugin name, or several as a list or as a mapping of names to options"
        many = origin is list or arguments[-1] is Ellipsis
        return f"list of {type_name(arguments[0])}" if many else f"list of {len(arguments)} values"
    if origin in (dict, Mapping):
        return "mapping"
    if hint is Choice:
        return "plugin name, or one name with its options"
    return getattr(hint, "__name__", str(hint))


def suggest(name: str, known: list[str]) -> str:
    """The end of an error about an unknown name: the nearest known one, else all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"there are: {', '.join(known)}" if known else "it has no settings"


def _parse(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type `hint`; raises ConfigError naming `path` if it is not one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if hint is Choice:
        return _parse_choice(value, path)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(hint, value, path)
    if origin is Literal and value in arguments and type(value) in {type(a) for a in arguments}:
        return value
    if origin in (tuple, list):
        return origin(_parse_sequence(hint, value, path))
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else parse_dataclass(hint, value, path)
    if hint is float:
        return _parse_float(value, path)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{path}: expected {type_name(hint)}, got {value!r}")


def _parse_float(value: Any, path: str) -> float:
    """Accepts `1e-3` too, which YAML reads as text for want of a dot."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise ConfigError(f"{path}: expected float, got {value!r}")


def _parse_union(hint: Any, value: Any, path: str) -> Any:
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if value is None and len(options) < len(typing.get_args(hint)):
        return None
    if len(options) == 1:
        return _parse(options[0], value, path)  # its own error says more than that of the union
    for option in options:
        try:
            return _parse(option, value, path)
        except ConfigError:
            continue
    raise ConfigError(f"{path}: expected {type_name(hint)}, got {value!r}")


def _parse_sequence(hint: Any, value: Any, path: str) -> list[Any]:
    """A list; for plugins also a single name, or a mapping of names to options."""
    items = typing.get_args(hint)
    if items[0] is Choice:
        if isinstance(value, Mapping):
            value = [{name: options} for name, options in value.items()]
        elif isinstance(value, (str, Choice)):
            value = [value]
    if typing.get_origin(hint) is list or items[-1] is Ellipsis:
        items = items[:1] * (len(value) if isinstance(value, (list, tuple)) else 0)
    if not isinstance(value, (list, tuple)) or len(value) != len(items):
        raise ConfigError(f"{path}: expected {type_name(hint)}, got {value!r}")
    where = [path if item is Choice else f"{path}[{i}]" for i, item in enumerate(items)]
    return [_parse(*each) for each in zip(items, value, where, strict=True)]


def _parse_choice(value: Any, path: str) -> Choice:
    if isinstance(value, Choice):
        return value
    if isinstance(value, str) and value:
        return Choice(name=value)
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, options),) = value.items()
        if options is None or isinstance(options, Mapping):
            return Choice(name=str(name), options=dict(options or {}))
        raise ConfigError(f"{path}.{name}: expected a mapping of settings, got {options!r}")
    raise ConfigError(f"{path}: expected {type_name(Choice)}, got {value!r}")


@functools.cache
def _meanings(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass and of its bases, read from the source."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # made at run time, or not to be dedented: it has no help, but works
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for line, below in itertools.pairwise(body):
            match line, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(meaning))):
                    found[name] = inspect.cleandoc(meaning)
    return found
