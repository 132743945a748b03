"""`accel plugins`: every installed plugin, listed without importing one."""

from __future__ import annotations

import argparse
from itertools import groupby

from .. import registry
from .table import columns

HELP = "List the installed plugins of every kind, with the package that each comes from."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing but the choice of a kind."""
    parser.add_argument("kind", nargs="?", choices=registry.KINDS, help="list only this kind")


def run(options: argparse.Namespace) -> int:
    """Print one table per kind; a plugin that cannot be used is marked with `!` and the reason."""
    listings = [entry for entry in registry.listings() if options.kind in (None, entry.kind)]
    width = max((len(cell) for entry in listings for cell in (entry.name, entry.package)), default=0)
    blocks = []
    for kind, entries in groupby(listings, key=lambda entry: entry.kind):
        rows = [
            (
                ("! " if entry.problem else "  ") + f"{entry.name:{width}}",
                f"{entry.package:{width}}",
                entry.problem or entry.summary,
            )
            for entry in entries
        ]
        blocks.append(f"{kind}\n{columns(rows)}")
    print("\n\n".join(blocks) or "No plugin is installed; `pip install accel-torch` brings the first ones.")
    return 0
