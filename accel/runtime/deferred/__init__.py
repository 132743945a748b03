"""Models that have no memory until they are divided: how they are built, and how they get their values."""

from .filling import Filling, give_memory, is_empty
from .parameters import replace_parameters
from .tape import Tape

__all__ = ["Filling", "Tape", "give_memory", "is_empty", "replace_parameters"]
