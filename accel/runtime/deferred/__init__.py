"""Models that have no memory until they are divided: how they are built, and how they get their values."""

from .filling import Filling, give_memory, is_empty
from .made_up import hollow_whole, made_up, runnable
from .parameters import replace_parameters
from .tape import Tape

__all__ = ["Filling", "Tape", "give_memory", "hollow_whole", "is_empty", "made_up", "replace_parameters", "runnable"]
