"""A user's own folder for config files, and an environment without settings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ..package_site import PackageSite


@pytest.fixture
def config_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `accel config` writes by default; nothing is there yet."""
    for name in [name for name in os.environ if name.startswith("ACCEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "accel" / "default_config.yaml"


@pytest.fixture
def child_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackageSite:
    """Packages that child processes find installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return PackageSite(folder)
