"""Plugins are found by their metadata, loaded by name and checked against their interface."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from accel import registry
from accel.config import Choice
from accel.errors import ConfigError, PluginError

from .package_site import PackageSite, on_path

STRATEGY = """
from dataclasses import dataclass
from accel.config import setting
from accel.interfaces import Strategy

class Plugin(Strategy):
    '''Does nothing, politely.

    And at length.
    '''

    @dataclass(frozen=True, kw_only=True)
    class Options(Strategy.Options):
        '''Options.'''

        politeness: int = setting(3, minimum=1)
        '''How politely.'''
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageSite]:
    site = PackageSite(tmp_path)
    with on_path(site, monkeypatch):
        yield site


def test_a_third_party_plugin_comes_through_the_same_door(site: PackageSite) -> None:
    site.install("polite-strategy", "strategy", "polite", STRATEGY)
    assert {"ddp", "polite"} <= set(registry.names("strategy"))
    plugin, options = registry.load_choice("strategy", Choice(name="polite", options={"politeness": 5}), "strategies")
    assert plugin.__name__ == "Plugin"
    assert (options.politeness, options.size) == (5, None)


def test_options_are_refused_with_their_path(site: PackageSite) -> None:
    site.install("polite-path", "strategy", "polite", STRATEGY)
    with pytest.raises(
        ConfigError, match=r"^strategies\.polite\.politness: no such setting; did you mean 'politeness'"
    ):
        registry.load_choice("strategy", Choice(name="polite", options={"politness": 5}), "strategies")
    with pytest.raises(ConfigError, match=r"^strategies\.polite\.politeness: must be at least 1, got 0"):
        registry.load_choice("strategy", Choice(name="polite", options={"politeness": 0}), "strategies")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"^mixed_precision: no precision named 'bf61' is installed; .*bf16, fp16, fp32"
    ):
        registry.load("precision", "bf61", "mixed_precision")


def test_two_packages_with_one_name_are_both_named(site: PackageSite) -> None:
    site.install("polite-one", "strategy", "polite", STRATEGY)
    site.install("polite-two", "strategy", "polite", STRATEGY)
    with pytest.raises(PluginError) as caught:
        registry.load("strategy", "polite")
    assert str(caught.value) == (
        "strategy 'polite' is claimed by several packages: polite-one (polite_one:Plugin), "
        "polite-two (polite_two:Plugin); uninstall all but one"
    )
    claims = [entry for entry in registry.listings() if entry.name == "polite"]
    assert [entry.package for entry in claims] == ["polite-one", "polite-two"]
    assert all("claimed by several packages" in entry.problem for entry in claims)


def test_a_package_cannot_take_a_name_that_ships_with_accel(site: PackageSite) -> None:
    site.install("my-ddp", "strategy", "ddp", STRATEGY)
    with pytest.raises(
        PluginError, match=r"'ddp' is claimed by several packages: accel-torch .*, my-ddp \(my_ddp:Plugin\)"
    ):
        registry.load("strategy", "ddp")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("raise RuntimeError('no such card')", "RuntimeError: no such card"),
        ("import package_that_is_not_there", "ModuleNotFoundError: No module named 'package_that_is_not_there'"),
        ("class Other: pass", "AttributeError: module 'broken_plugin' has no attribute 'Plugin'"),
        ("class Plugin(:", "SyntaxError"),
        ("", "ModuleNotFoundError: No module named 'broken_plugin'"),
    ],
)
def test_a_plugin_that_fails_to_import(site: PackageSite, source: str, problem: str) -> None:
    site.install("broken-plugin", "tracker", "broken", source)
    with pytest.raises(PluginError) as caught:
        registry.load("tracker", "broken")
    assert str(caught.value).startswith(
        "tracker 'broken' of package broken-plugin (broken_plugin:Plugin) failed to import: "
    )
    assert problem in str(caught.value)
    sys.modules.pop("broken_plugin", None)


MISFITS = {
    "not a class": ("strategy", "Plugin = 3", "it must be a subclass of Strategy, got 3"),
    "another base": ("strategy", "class Plugin: pass", "it must be a subclass of Strategy"),
    "plain Options": (
        "strategy",
        "class Plugin(Strategy):\n    class Options: pass",
        "its Options must be a frozen dataclass",
    ),
    "thawed Options": (
        "precision",
        "class Plugin(Precision):\n    @dataclass\n    class Options:\n        loss: int = 3",
        "its Options must be a frozen dataclass",
    ),
    "undecorated Options": (
        "strategy",
        "class Plugin(Strategy):\n    class Options(Strategy.Options):\n        lost: int = 3",
        "its Options must be a frozen dataclass",
    ),
    "Options from nowhere": (
        "strategy",
        "class Plugin(Strategy):\n    @dataclass(frozen=True)\n    class Options:\n        speed: int = 3",
        "its Options must derive from Strategy.Options, which has size",
    ),
    "inherited misfit Options": (
        "strategy",
        "class Base(Strategy):\n    class Options: pass\nclass Plugin(Base): pass",
        "its Options must be a frozen dataclass",
    ),
    "too few arguments": (
        "strategy",
        "class Plugin(Strategy):\n    def setup(self): pass",
        "setup(self) must accept the arguments of setup(self, model",
    ),
    "too many arguments": (
        "tracker",
        "class Plugin(Tracker):\n    def log(self, values, step, colour): pass",
        "log(self, values, step, colour) must accept the arguments of log(self, values",
    ),
    "classmethod misfit": (
        "device",
        "class Plugin(Device):\n    def count(self): return 1",
        "count(self) must accept the arguments of count()",
    ),
    "not a method": ("tracker", "class Plugin(Tracker):\n    finish = 3", "finish must be a method, got 3"),
    "constructor": (
        "tracker",
        "class Plugin(Tracker):\n    def __init__(self): pass",
        "Plugin() must accept the arguments of Plugin(options",
    ),
    "attribute of another type": (
        "strategy",
        "class Plugin(Strategy):\n    axis = 'batch'",
        "axis must be of type Axis, like <Axis.DATA: 'data'>; got 'batch'",
    ),
    "abstract": ("checkpoint", "class Plugin(Checkpoint): pass", "it must define layout, places"),
}


@pytest.mark.parametrize(("kind", "source", "problem"), MISFITS.values(), ids=MISFITS)
def test_a_class_that_does_not_fit_its_interface(site: PackageSite, kind: str, source: str, problem: str) -> None:
    header = "from dataclasses import dataclass\nfrom accel.interfaces import *\n"
    site.install("mis-fit", kind, "misfit", header + source)
    with pytest.raises(PluginError) as caught:
        registry.load(kind, "misfit")
    sys.modules.pop("mis_fit", None)
    assert str(caught.value).startswith(
        f"{kind} 'misfit' of package mis-fit (mis_fit:Plugin) does not fit its interface "
    )
    assert problem in str(caught.value)


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_plugin_that_ships_fits(kind: str) -> None:
    assert registry.names(kind)
    for name in registry.names(kind):
        registry.load(kind, name)


def test_listing_reads_summaries_without_importing_anything(site: PackageSite) -> None:
    """Not even the package above a plugin's module, and through a package that imports the class from elsewhere."""
    package = site.folder / "loud_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')\nfrom .inner import Plugin as Renamed\n")
    (package / "inner.py").write_text("class Plugin:\n    '''Quiet inside.'''\n")
    site.register("loud", "[accel.trackers]\nloud = loud_package.inner:Plugin\nlouder = loud_package:Renamed\n")
    summaries = {entry.name: (entry.summary, entry.problem) for entry in registry.listings()}
    assert summaries["loud"] == summaries["louder"] == ("Quiet inside.", "")


def test_lines_of_plugins_are_none_of_the_users(site: PackageSite) -> None:
    site.register("own", "[accel.trackers]\nown = project.tracking:Plugin\ndeep = other.plugins.tracking:Plugin\n")
    machinery = {"accel.plan", "torch.nn", "project.tracking", "other.plugins.files"}
    for module in machinery | {"accelerate", "project.main", "other"}:
        exec("import sys; frame = sys._getframe()", scope := {"__name__": module})
        assert registry.is_machinery(scope["frame"]) == (module in machinery), module


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("nowhere_at_all:Plugin", "no module nowhere_at_all"),
        ("accel.nowhere:Plugin", "no module accel.nowhere"),
        ("accel.errors:Plugin", "no class Plugin in accel.errors"),
        ("sys:Plugin", "no source of module sys"),
    ],
)
def test_listing_marks_a_target_that_cannot_be_read(site: PackageSite, target: str, problem: str) -> None:
    site.register("astray", f"[accel.trackers]\nastray = {target}\n")
    (entry,) = (entry for entry in registry.listings() if entry.name == "astray")
    assert entry.problem == f"cannot be read: {problem}"


def test_loading_every_plugin_imports_no_torch() -> None:
    code = (
        "import sys; from accel import registry\n"
        "for kind in registry.KINDS:\n    for name in registry.names(kind): registry.load(kind, name).Options\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
