"""Seeding."""

from __future__ import annotations

from ..runtime import random
from ..runtime.world import World


def set_seed(seed: int, device_specific: bool = False) -> None:
    """Seed Python's, numpy's and torch's generators; all ranks.

    With `device_specific` rank r is seeded with `seed + r`, so that dropout differs between processes.
    """
    random.set_seed(seed + World.from_environment().rank if device_specific else seed)
