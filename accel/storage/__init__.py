"""Checkpoint folders on disk: bytes, manifests, names. Needs no torch, so that the command line can use it too."""

from .checked import LATER, NOW, CheckedReader
from .commit import aside, clear, commit, commit_files, delete, made_aside, remove
from .disk import CHUNK, Geometry, Range, Reader, Writer, checksum
from .folders import FOLDER, absolute, complete, find, named, newest_first, next_folder, parse_size, rotate
from .manifest import MANIFEST, Manifest, Problem, read_manifest
from .merge import merge

__all__ = [
    "CHUNK",
    "FOLDER",
    "LATER",
    "MANIFEST",
    "NOW",
    "CheckedReader",
    "Geometry",
    "Manifest",
    "Problem",
    "Range",
    "Reader",
    "Writer",
    "absolute",
    "aside",
    "checksum",
    "clear",
    "commit",
    "commit_files",
    "complete",
    "delete",
    "find",
    "made_aside",
    "merge",
    "named",
    "newest_first",
    "next_folder",
    "parse_size",
    "read_manifest",
    "remove",
    "rotate",
]
