"""Checkpoints of a whole run: parallel, without gathering, and blind to strategy and number of processes."""

from .checkpoints import Checkpoints
from .contents import State, group_of
from .fit import Differences
from .pickled import Pickled

__all__ = ["Checkpoints", "Differences", "Pickled", "State", "group_of"]
