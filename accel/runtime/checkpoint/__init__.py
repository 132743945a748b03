"""Checkpoints of a whole run: parallel, without gathering, and blind to strategy and number of processes."""

from .checkpoints import Checkpoints
from .contents import State, group_of
from .fit import Differences

__all__ = ["Checkpoints", "Differences", "State", "group_of"]
