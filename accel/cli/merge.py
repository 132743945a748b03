"""`accel merge`: the weights of a checkpoint, or of any folder of safetensors, as one file. Needs no torch, no GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import registry
from ..config import resolve
from ..errors import CheckpointError
from ..storage import MANIFEST, Manifest, complete, merge

HELP = "Write the weights of a checkpoint into one safetensors file."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder and the file."""
    parser.add_argument("folder", type=Path, help="a checkpoint, or what save_model wrote")
    parser.add_argument("output", type=Path, help="the file to write, or a folder for `model.safetensors`")


def run(options: argparse.Namespace) -> int:
    """Write the file and say how large it is."""
    if (options.folder / MANIFEST).exists():
        _verify(options.folder)
    target = options.output / "model.safetensors" if _is_folder(options.output) else options.output
    plugin, settings = registry.load_choice("checkpoint", resolve(None).config.checkpoint, "checkpoint")
    size = merge(options.folder, target, plugin(settings))
    print(f"{target}: {size:,} bytes of tensors")
    return 0


def _verify(folder: Path) -> None:
    """Raise CheckpointError if the weights of a checkpoint are damaged."""
    manifest = complete(folder)
    weights = [r for r in manifest.ranges if r.file.startswith("model")]
    for problem in Manifest(manifest.sizes, weights).problems(folder):
        raise CheckpointError(f"{folder / str(problem)}; merge another checkpoint")


def _is_folder(path: Path) -> bool:
    return path.is_dir() or not path.suffix
