"""Finds plugins by kind and name through Python entry points.

Listing costs no import of a plugin; `load` imports one class and checks it against its interface. The plugins
that ship with accel come through this door like any other package's: the core names none of them.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec, resolve_name
from pathlib import Path
from types import FrameType
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
    problem: str = ""
    """Why it cannot be used, as far as that shows without importing it."""


def names(kind: str) -> list[str]:
    """Names of the installed plugins of a kind, sorted."""
    return sorted({point.name for point in _points(kind)})


def listings() -> Iterator[Listing]:
    """Every installed plugin of every kind, sorted by kind and name; a name claimed twice appears twice."""
    for kind in KINDS:
        for point in sorted(_points(kind), key=lambda p: (p.name, p.value)):
            yield _listing(kind, point)


def is_machinery(frame: FrameType) -> bool:
    """Whether this is code of accel, of a plugin or of torch: no line of the user's that could be mended.

    A plugin's code is its own module, and the package around it unless that is a whole project's.
    """
    return _is_machinery(frame.f_globals.get("__name__", ""))


@functools.cache
def _is_machinery(module: str) -> bool:
    plugins = {point.module for kind in KINDS for point in _points(kind)}
    packages = {plugin.rpartition(".")[0] if plugin.count(".") > 1 else plugin for plugin in plugins}
    return any(module == name or module.startswith(f"{name}.") for name in {"accel", "torch", *packages})


def load(kind: str, name: str, path: str | None = None) -> type[Any]:
    """Import the one plugin class of this kind and name, and check it against its interface.

    `path` is the setting that asked for it (default: the kind). Raises ConfigError if no such plugin is
    installed, PluginError if several packages claim the name, or it fails to import or to fit.
    """
    found = [point for point in _points(kind) if point.name == name]
    if not found:
        raise ConfigError(f"{path or kind}: no {kind} named {name!r} is installed; there are: {', '.join(names(kind))}")
    if claims := _rival_claims(found):
        raise PluginError(f"{kind} {name!r} is {claims}; uninstall all but one")
    return _load(kind, found[0])


def load_choice(kind: str, choice: Choice, path: str) -> tuple[type[Any], Any]:
    """The plugin class that a choice names and its parsed `Options`. Raises ConfigError with the setting's path."""
    plugin = load(kind, choice.name, path)
    return plugin, parse_dataclass(plugin.Options, choice.options, f"{path}.{choice.name}")


def _points(kind: str) -> tuple[EntryPoint, ...]:
    return _installed()[kind]


@functools.cache
def _installed() -> dict[str, tuple[EntryPoint, ...]]:
    """The entry points of each kind, all found in one go: it takes reading the metadata of every package."""
    found = entry_points()
    return {kind: tuple(found.select(group=group)) for kind, (group, _) in INTERFACES.items()}


def _rival_claims(points: Sequence[EntryPoint]) -> str:
    """Who claims one name for different classes; empty if there is no dispute."""
    if len({point.value for point in points}) < 2:
        return ""
    claims = ", ".join(f"{_package(p)} ({p.value})" for p in sorted(points, key=lambda p: p.value))
    return f"claimed by several packages: {claims}"


def _listing(kind: str, point: EntryPoint) -> Listing:
    summary, problem = "", _rival_claims([p for p in _points(kind) if p.name == point.name])
    module, _, attribute = point.value.partition(":")
    try:
        summary = _summary(module.strip(), attribute.strip())
    except (PluginError, ImportError, OSError, SyntaxError, ValueError) as error:
        problem = problem or f"cannot be read: {error}"
    return Listing(kind, point.name, _package(point), point.value, summary, problem)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "unknown package"


def _load(kind: str, point: EntryPoint) -> type[Any]:
    origin = f"{kind} {point.name!r} of package {_package(point)} ({point.value})"
    try:
        plugin = point.load()
    except Exception as error:  # whatever a plugin's import raises is reported as that plugin's
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
    if abstract := sorted(getattr(plugin, "__abstractmethods__", ())):
        return f"it must define {', '.join(abstract)}"
    if problem := _misfit_options(plugin.Options, interface):  # type: ignore[attr-defined]
        return problem
    if problem := _misfit_method(f"{plugin.__name__}", plugin, interface):
        return problem
    for name in (name for name in dir(interface) if not name.startswith("_") and name != "Options"):
        own, expected = getattr(plugin, name), getattr(interface, name)
        if inspect.isroutine(expected):
            problem = _misfit_method(name, own, expected)
        elif not isinstance(own, type(expected)):
            problem = f"{name} must be of type {type(expected).__name__}, like {expected!r}; got {own!r}"
        if problem:
            return problem
    return None


def _misfit_options(options: Any, interface: type[Any]) -> str | None:
    """Why `options` cannot be the settings of a plugin; the settings that it inherits are part of the interface."""
    declared = isinstance(options, type) and "__dataclass_fields__" in vars(options)  # not merely inherited
    if not declared or not options.__dataclass_params__.frozen:
        return f"its Options must be a frozen dataclass, got {options!r}"
    if missing := {f.name for f in fields(interface.Options)} - {f.name for f in fields(options)}:
        return f"its Options must derive from {interface.__name__}.Options, which has {', '.join(sorted(missing))}"
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


def _summary(module: str, name: str, depth: int = 5) -> str:
    """First line of the docstring of a class, read from its source: importing it might import torch.

    Follows up to `depth` imports of the class from another module. Raises PluginError if it cannot be found.
    """
    source = _source(module)
    for node in ast.parse(source.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
        if isinstance(node, ast.ImportFrom) and depth:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    package = module if source.name == "__init__.py" else module.rpartition(".")[0]
                    home = resolve_name("." * node.level + (node.module or ""), package)
                    return _summary(home, alias.name, depth - 1)
    raise PluginError(f"no class {name} in {module}")


def _source(module: str) -> Path:
    """The source file of a module, found without importing the packages above it."""
    top, *below = module.split(".")
    spec = find_spec(top)
    for name in below:
        if spec is not None:
            spec = PathFinder.find_spec(f"{spec.name}.{name}", [*(spec.submodule_search_locations or [])])
    if spec is None:
        raise PluginError(f"no module {module}")
    if not spec.origin or not spec.origin.endswith(".py"):
        raise PluginError(f"no source of module {module}")
    return Path(spec.origin)
