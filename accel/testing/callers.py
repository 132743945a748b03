"""What a caller sends to the warm process, and where its modules are found: by name, or by file."""

from __future__ import annotations

import importlib.util
import io
import pickle
import runpy
import sys
from collections.abc import Mapping
from typing import Any


class Unpickler(pickle.Unpickler):
    """Opens it; `files` says where modules are that may not be on the path, `__main__` for one."""

    def __init__(self, data: bytes, files: Mapping[str, str]) -> None:
        super().__init__(io.BytesIO(data))
        self.files = files

    def find_class(self, module: str, name: str) -> Any:
        if module == "__main__" and module in self.files:
            return _attribute(_main_module(self.files[module]), name)
        if module in self.files and not _importable(module):
            _import_file(module, self.files[module])
        return super().find_class(module, name)


def _importable(module: str) -> bool:
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is not importable
        return False


def _import_file(module: str, file: str) -> None:
    spec = importlib.util.spec_from_file_location(module, file)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"cannot import {module} from {file}", name=module)
    sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[module])


def _main_module(file: str) -> Any:
    """The caller's script, run under another name so that its `if __name__ == "__main__"` stays shut."""
    if getattr(sys.modules["__main__"], "__file__", None) != file:
        namespace = runpy.run_path(file, run_name="__mp_main__")
        sys.modules["__main__"] = importlib.util.module_from_spec(
            importlib.util.spec_from_loader("__mp_main__", None)  # type: ignore[arg-type]
        )
        vars(sys.modules["__main__"]).update(namespace, __file__=file)
    return sys.modules["__main__"]


def _attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module
