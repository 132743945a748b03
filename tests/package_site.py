"""Packages with plugins, installed for one test: real metadata and real modules in a folder on the path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import pytest

from accel import registry


class PackageSite:
    """A folder that holds installed packages, as site-packages does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, package: str, kind: str, name: str, source: str, module: str | None = None) -> None:
        """Install a package with one module, whose class `Plugin` is a plugin; empty source leaves the module out."""
        module = module or package.replace("-", "_")
        if source:
            (self.folder / f"{module}.py").write_text(dedent(source))
        self.register(package, f"[{registry.INTERFACES[kind][0]}]\n{name} = {module}:Plugin\n")

    def register(self, package: str, entry_points: str) -> None:
        """Write the metadata of a package with these entry points."""
        info = self.folder / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points)


@contextmanager
def on_path(site: PackageSite, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process see the site's packages."""
    monkeypatch.syspath_prepend(site.folder)
    _forget()
    yield
    monkeypatch.undo()
    _forget()


def _forget() -> None:
    registry._installed.cache_clear()
    registry._is_machinery.cache_clear()
