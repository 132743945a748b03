"""The JSON Schema of config files, for editors: from `Config` and the Options of every installed plugin.

It accepts what `accel.config` accepts. An editor finds it through a first line in the YAML file:
`# yaml-language-server: $schema=accel.schema.json`, after `accel config schema > accel.schema.json`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .. import registry
from ..config import Choice, Config, Setting, describe

_FLOAT_TEXT = r"^\s*[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"
"""What YAML reads as text for want of a dot, and accel as a number: 1e-3."""

_SIMPLE: Mapping[Any, dict[str, Any]] = {
    Any: {},
    int: {"type": "integer"},
    float: {"type": ["number", "string"], "pattern": _FLOAT_TEXT},
    bool: {"type": "boolean"},
    str: {"type": "string"},
    type(None): {"type": "null"},
}


def schema() -> dict[str, Any]:
    """The whole schema. Raises PluginError for a plugin that cannot be used."""
    listings = list(registry.listings())
    definitions = {kind: _choice(kind, [each for each in listings if each.kind == kind]) for kind in registry.KINDS}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "accel config",
        **_dataclass(Config),
        "type": ["object", "null"],
        "$defs": definitions,
    }


def _dataclass(cls: type) -> dict[str, Any]:
    settings = describe(cls)
    found = {
        "type": "object",
        "additionalProperties": False,
        "properties": {setting.name: _setting(setting) for setting in settings},
    }
    required = [setting.name for setting in settings if setting.required]
    return found | ({"required": required} if required else {})


def _setting(declared: Setting) -> dict[str, Any]:
    found = _type(declared.type, declared.plugin)
    if declared.minimum is not None:
        found = {"allOf": [found, {"minimum": declared.minimum}]}
    if declared.no:
        found = {"anyOf": [found, {"enum": ["no", False]}]}
    if declared.meaning:
        found = found | {"description": declared.meaning}
    return found


def _type(hint: Any, kind: str | None = None) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SIMPLE:
        return dict(_SIMPLE[hint])
    if hint is Choice:
        return {"$ref": f"#/$defs/{kind}"}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_type(argument, kind) for argument in arguments]}
    if origin in (tuple, list):
        return _sequence(origin, arguments, kind)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _dataclass(hint)
    return {"type": "object"}


def _sequence(origin: Any, arguments: tuple[Any, ...], kind: str | None) -> dict[str, Any]:
    if arguments[0] is Choice:
        one = {"$ref": f"#/$defs/{kind}"}
        several = {"type": "object", "additionalProperties": False, "properties": _options(str(kind))}
        return {"anyOf": [{"type": "array", "items": one}, one, several]}
    if origin is list or arguments[-1] is Ellipsis:
        return {"type": "array", "items": _type(arguments[0], kind)}
    items = [_type(argument, kind) for argument in arguments]
    return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}


def _choice(kind: str, listings: Sequence[registry.Listing]) -> dict[str, Any]:
    """A plugin of a kind: its name, if that is enough, or its name with options."""
    summaries = {listing.name: listing.summary for listing in listings}
    alone = [name for name in summaries if not _dataclass(registry.load(kind, name).Options).get("required")]
    with_options = {
        "type": "object",
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
        "properties": _options(kind),
    }
    return {"anyOf": [*({"const": name, "description": summaries[name]} for name in alone), with_options]}


def _options(kind: str) -> dict[str, Any]:
    """The settings of each plugin of a kind, by its name; nothing at all stands for an empty mapping."""
    schemas = {name: _dataclass(registry.load(kind, name).Options) for name in registry.names(kind)}
    return {
        name: found if found.get("required") else {"anyOf": [found, {"type": "null"}]}
        for name, found in schemas.items()
    }
