"""For accel's own tests and for plugin authors: `run` a function on n processes, tiny models, contracts.

A plugin's tests call `run` for what is special about it, and the contracts of its kind for what is not.
"""

from .processes import Processes, WorkerError, run, shared_processes

__all__ = ["Processes", "WorkerError", "run", "shared_processes"]
