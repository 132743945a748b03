"""Runs commands as a user would: in the repository's root, with this environment's `python` and `accel` first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(
    *command: str, path: Path | None = None, folder: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder` and fail with what it printed unless it exits with 0.

    `path` is one more folder to import from, `variables` are more for the environment.
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ACCEL_")}
    environ["OMP_NUM_THREADS"] = "1"  # threads of one process wait for each other where tests share the cores
    environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environ["PATH"]])
    if path is not None:
        environ["PYTHONPATH"] = str(path)
    done = subprocess.run(
        command,
        cwd=folder,
        env=environ | variables,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=110,
    )
    assert done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def install_third_party(target: Path) -> None:
    """Install `examples/third_party` into a folder, and nothing else."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps")
    run(*pip, "--no-build-isolation", "--target", str(target), str(ROOT / "examples" / "third_party"))
