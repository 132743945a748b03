"""Finds plugins by kind and name through Python entry points.

Listing costs no import of a plugin; `load` imports one class and checks it against its interface. The plugins
that ship with accel come through this door like any other package's: the core names none of them.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .config import Choice, parse_dataclass
from .errors import ConfigError, PluginError

INTERFACES = {
    "strategy": ("accel.strategies", "accel.interfaces.strategy:Strategy"),
    "precision": ("accel.precisions", "accel.interfaces.precision:Precision"),
    "device": ("accel.devices", "accel.interfaces.device:Device"),
    "launcher": ("accel.launchers", "accel.interfaces.launcher:Launcher"),
    "checkpoint": ("accel.checkpoints", "accel.interfaces.checkpoint:Checkpoint"),
    "tracker": ("accel.trackers", "accel.interfaces.tracker:Tracker"),
}
"""Each kind of plugin: its entry-point group and the class whose interface a plugin of that kind keeps."""

KINDS = tuple(INTERFACES)


@dataclass(frozen=True)
class Listing:
    """One installed plugin, described without importing it."""

    kind: str
    name: str
    package: str
    target: str
    summary: str


def names(kind: str) -> list[str]:
    """Names of the installed plugins of a kind, sorted."""
    return sorted({point.name for point in _points(kind)})


def listings() -> Iterator[Listing]:
    """Every installed plugin of every kind, sorted by kind and name; a name claimed twice appears twice."""
    for kind in KINDS:
        for point in sorted(_points(kind), key=lambda p: (p.name, p.value)):
            yield Listing(kind, point.name, _package(point), point.value, _summary(point))


def load(kind: str, name: str, path: str | None = None) -> type[Any]:
    """Import the one plugin class of this kind and name, and check it against its interface.

    `path` is the setting that asked for it (default: the kind). Raises ConfigError if no such plugin is
    installed, PluginError if several packages claim the name, or it fails to import or to fit.
    """
    found = [point for point in _points(kind) if point.name == name]
    if not found:
        raise ConfigError(f"{path or kind}: no {kind} named {name!r} is installed; there are: {', '.join(names(kind))}")
    if len({point.value for point in found}) > 1:
        claims = ", ".join(f"{_package(p)} ({p.value})" for p in sorted(found, key=lambda p: p.value))
        raise PluginError(f"{kind} {name!r} is claimed by several packages: {claims}; uninstall all but one")
    return _load(kind, found[0])


def load_choice(kind: str, choice: Choice, path: str) -> tuple[type[Any], Any]:
    """The plugin class that a choice names and its parsed `Options`. Raises ConfigError with the setting's path."""
    plugin = load(kind, choice.name, path)
    return plugin, parse_dataclass(plugin.Options, choice.options, f"{path}.{choice.name}")


@functools.cache
def _points(kind: str) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=INTERFACES[kind][0]))


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "unknown package"


def _load(kind: str, point: EntryPoint) -> type[Any]:
    origin = f"{kind} {point.name!r} of package {_package(point)} ({point.value})"
    try:
        plugin = point.load()
    except Exception as error:  # noqa: BLE001 - whatever a plugin's import raises is reported as that plugin's
        raise PluginError(f"{origin} failed to import: {type(error).__name__}: {error}") from error
    module, _, attribute = INTERFACES[kind][1].partition(":")
    interface = getattr(importlib.import_module(module), attribute)
    if problem := misfit(plugin, interface):
        raise PluginError(f"{origin} does not fit its interface {module}.{attribute}: {problem}")
    return plugin  # type: ignore[no-any-return]


def misfit(plugin: object, interface: type[Any]) -> str | None:
    """Why `plugin` cannot stand in for `interface`; None if it can."""
    if not isinstance(plugin, type) or not issubclass(plugin, interface):
        return f"it must be a subclass of {interface.__name__}, got {plugin!r}"
    options = plugin.__dict__.get("Options", interface.Options)
    if not (is_dataclass(options) and isinstance(options, type) and options.__dataclass_params__.frozen):
        return f"its Options must be a frozen dataclass, got {options!r}"
    if missing := {f.name for f in fields(interface.Options)} - {f.name for f in fields(options)}:
        return f"its Options must derive from {interface.__name__}.Options, which has {', '.join(sorted(missing))}"
    for name, method in inspect.getmembers(interface, inspect.isfunction):
        if not name.startswith("_") and (problem := _misfit_method(name, getattr(plugin, name), method)):
            return problem
    if abstract := sorted(getattr(plugin, "__abstractmethods__", ())):
        return f"it must define {', '.join(abstract)}"
    return None


def _misfit_method(name: str, own: Any, expected: Any) -> str | None:
    """Why a call written for the interface's method would fail on the plugin's; None if it would not."""
    if not callable(own):
        return f"{name} must be a method, got {own!r}"
    theirs, ours = inspect.signature(expected), inspect.signature(own)
    try:
        ours.bind(*[object()] * len(theirs.parameters))
    except TypeError:
        return f"{name}{ours} must accept the arguments of {name}{theirs}"
    return None


def _summary(point: EntryPoint) -> str:
    """First line of the class's docstring, read from its source: importing it might import torch."""
    try:
        spec = find_spec(point.module)
        tree = ast.parse(Path(spec.origin).read_text("utf-8")) if spec and spec.origin else ast.Module([], [])
    except (ImportError, OSError, SyntaxError) as error:
        return f"(cannot be read: {error})"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == point.attr:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""
