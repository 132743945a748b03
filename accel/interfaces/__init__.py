"""The whole extension surface: one small file per kind of plugin, each base class the working default.

Importing this package, or a plugin's module, imports no torch: the command line reads options and docstrings
from them. Plugins import torch inside the methods that run in a worker.
"""

from .checkpoint import PAGE, Checkpoint, Entry, File, Place
from .device import Device, Memory, Support
from .launcher import Launcher
from .precision import Precision, Steppable
from .strategy import MESH_ORDER, SETUP_ORDER, Axis, AxisMesh, Strategy
from .tracker import Tracker

__all__ = [
    "MESH_ORDER",
    "PAGE",
    "SETUP_ORDER",
    "Axis",
    "AxisMesh",
    "Checkpoint",
    "Device",
    "Entry",
    "File",
    "Launcher",
    "Memory",
    "Place",
    "Precision",
    "Steppable",
    "Strategy",
    "Support",
    "Tracker",
]
